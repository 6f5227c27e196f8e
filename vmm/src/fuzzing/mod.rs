//! Ways in for the fuzz targets of tests/fuzz, to what other parties control and is private otherwise. Nothing of the
//! VMM uses them.
#![forbid(unsafe_code)]

mod machine;

pub use self::machine::guest_io;

/// What a client of the API sends.
pub fn api(data: &[u8]) {
    crate::api::fuzz_requests(data);
}

/// What a guest puts into the queues of its balloon.
pub fn balloon(data: &[u8]) {
    crate::devices::virtio::balloon::guest_queues(data);
}

/// What a vhost-user backend says.
pub fn backend(data: &[u8]) {
    crate::vhost_user::fuzz_backend(data);
}

/// What a guest puts into a ring that has a shadow.
pub fn shadow(data: &[u8]) {
    crate::vhost_user::fuzz_shadow(data);
}
