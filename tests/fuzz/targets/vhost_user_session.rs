//! A whole session of well-framed requests in any order: features, memory, vrings, configuration.
//!
//! Input: for each request one byte each of number, flags (bit 0 NEED_REPLY, bits 1-3 number of
//! fds) and payload length, then the payload. Fds are the memory of a fake guest, or an eventfd
//! for kick, call and err.
#![no_main]

use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use berth_queue_worker::SessionOptions;
use berth_queue_worker::daemon::serve_connection;
use berth_queue_worker::protocol::connection::send_with_fds;
use berth_queue_worker::protocol::message::frontend_request;
use berth_queue_worker::testing::{DriverQueue, Echo, GuestRam};
use berth_queue_worker::{Device, Metrics};
use libfuzzer_sys::fuzz_target;

/// Few enough that no reply has to wait for room in the socket.
const MAX_REQUESTS: usize = 24;

fuzz_target!(|data: &[u8]| {
    let (ours, theirs) = UnixStream::pair().expect("socketpair");
    let ram = std::sync::Arc::new(GuestRam::new(0x10000, 0x10000));
    let queue = DriverQueue::new(&ram, 0, 16, u64::MAX);
    let mut rest = data;
    for _ in 0..MAX_REQUESTS {
        let [number, flags, len, tail @ ..] = rest else {
            break;
        };
        let (payload, tail) = tail.split_at(usize::from(*len).min(tail.len()));
        rest = tail;
        let bytes = frontend_request(u32::from(*number), flags & 1 != 0, payload);
        let fd: BorrowedFd = match number {
            12 => queue.kick_fd(),
            13 => queue.call_fd(),
            14 => queue.err_fd(),
            _ => ram.fd(),
        };
        let fds = vec![fd; usize::from(flags >> 1 & 7)];
        if send_with_fds(ours.as_fd(), &bytes, &fds).is_err() {
            break;
        }
    }
    let _ = ours.shutdown(std::net::Shutdown::Write);
    let device = Echo::new(2);
    let metrics = Metrics::new(Echo::NAME, device.num_queues());
    serve_connection(device, metrics, theirs, SessionOptions::default())
        .expect("session could begin");
});
