//! vhost-user frontend: devices that live in another process.
