//! What docs/adr/0001 says about vhost 0.18 and vhost-user-backend 0.24, shown on a stock device
//! of theirs. When one of these fails after an update, the decision can be looked at again.
#![allow(clippy::unwrap_used, missing_docs)]

use std::io;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use berth_queue_worker::protocol::message::FrontendReq;
use berth_queue_worker::testing::FakeFrontend;
use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vhost_user_backend::{VhostUserBackendMut, VhostUserDaemon, VringRwLock};
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;

/// A device that does nothing and offers everything.
struct Stock;

impl VhostUserBackendMut for Stock {
    type Bitmap = ();
    type Vring = VringRwLock;

    fn num_queues(&self) -> usize {
        2
    }
    fn max_queue_size(&self) -> usize {
        256
    }
    fn features(&self) -> u64 {
        1 << 32 | 1 << 30
    }
    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::all()
    }
    fn set_event_idx(&mut self, _enabled: bool) {}
    fn update_memory(&mut self, _mem: GuestMemoryAtomic<GuestMemoryMmap>) -> io::Result<()> {
        Ok(())
    }
    fn handle_event(
        &mut self,
        _event: u16,
        _set: EventSet,
        _vrings: &[VringRwLock],
        _thread: usize,
    ) -> io::Result<()> {
        Ok(())
    }
}

/// A socket that goes with the test, also with one that fails.
struct SocketPath(PathBuf);

impl Drop for SocketPath {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// A session with a stock device; what `talk` found.
fn with_stock<T>(name: &str, talk: impl FnOnce(&mut FakeFrontend) -> T) -> T {
    let file = format!("berth-adr0001-{}-{name}.sock", std::process::id());
    let path = SocketPath(std::env::temp_dir().join(file));
    let memory = GuestMemoryAtomic::new(GuestMemoryMmap::<()>::new());
    let device = Arc::new(Mutex::new(Stock));
    let mut daemon = VhostUserDaemon::new("stock".to_owned(), device, memory).unwrap();
    let mut listener = vhost::vhost_user::Listener::new(&*path.0, true).unwrap();
    // The connection waits in the backlog until the daemon accepts it.
    let mut frontend = FakeFrontend::new(UnixStream::connect(&path.0).unwrap());
    daemon.start(&mut listener).unwrap();
    let result = talk(&mut frontend);
    frontend.disconnect();
    let _ = daemon.wait();
    // Its drop would wait for queue threads that nothing tells to end.
    std::mem::forget(daemon);
    result
}

/// Whether the session ends when `request` comes after everything has been negotiated.
fn ends_at(name: &str, request: FrontendReq, payload: &[u8]) -> bool {
    with_stock(name, |frontend| {
        frontend.negotiate(u64::MAX);
        assert_eq!(frontend.number(FrontendReq::GET_QUEUE_NUM), 2);
        frontend.send(request, payload, &[]);
        // Either the answer to this comes, or the end.
        frontend.send(FrontendReq::GET_QUEUE_NUM, &[], &[]);
        frontend.is_closed_or_number(FrontendReq::GET_QUEUE_NUM)
    })
}

#[test]
fn ring_enabled_before_features_ends_the_session() {
    let enable = [0u32.to_ne_bytes(), 1u32.to_ne_bytes()].concat();
    let closed = with_stock("enable", |frontend| {
        frontend.send(FrontendReq::SET_OWNER, &[], &[]);
        frontend.send(FrontendReq::SET_VRING_ENABLE, &enable, &[]);
        frontend.is_closed()
    });
    assert!(closed);
    // The order it expects is fine: it is the order alone.
    assert!(!ends_at("order", FrontendReq::SET_VRING_ENABLE, &enable));
}

#[test]
fn rarp_mtu_status_and_inflight_end_the_session_although_they_were_offered() {
    assert!(ends_at("rarp", FrontendReq::SEND_RARP, &[0; 8]));
    assert!(ends_at("mtu", FrontendReq::NET_SET_MTU, &[0; 8]));
    assert!(ends_at("setstatus", FrontendReq::SET_STATUS, &[0; 8]));
    assert!(ends_at("getstatus", FrontendReq::GET_STATUS, &[]));
    let mut inflight = [0; 24];
    inflight[16] = 2;
    inflight[18] = 128;
    assert!(ends_at("inflight", FrontendReq::GET_INFLIGHT_FD, &inflight));
}
