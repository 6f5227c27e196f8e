//! Wire types of the berth-vmm REST API.
//!
//! The JSON is Cloud Hypervisor's: same names, same nesting, so that its clients can read it. Fields that
//! are not known are ignored and fields that are missing take their default, both ways. No logic here,
//! and no dependency on the VMM.

#![forbid(unsafe_code)]

pub mod v1;
