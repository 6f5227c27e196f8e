//! Guest cases, interop cases and the demo
