//! The vhost-user codec: a header, a payload and a number of fds, all of the frontend's choice.
#![no_main]

use berth_queue_worker::protocol::message::{HEADER_SIZE, Header, Request};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Some((&num_fds, rest)) = data.split_first() else {
        return;
    };
    let Some((header, payload)) = rest.split_first_chunk::<HEADER_SIZE>() else {
        return;
    };
    if let Ok(header) = Header::parse(header) {
        let payload = &payload[..payload.len().min(header.size)];
        let _ = Request::parse(&header, payload, usize::from(num_fds));
    }
});
