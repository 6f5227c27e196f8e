//! All that a vhost-user device process needs except the device
