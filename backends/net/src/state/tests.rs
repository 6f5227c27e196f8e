//! The driver's choices, seen from the port and the configuration space.

use super::*;
use crate::port::frame::Frame;
use crate::port::testing::{Event, SocketPort};
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CTRL_RX, VIRTIO_NET_F_GUEST_ANNOUNCE, VIRTIO_NET_F_GUEST_CSUM,
    VIRTIO_NET_F_GUEST_TSO4,
};

const MQ: u64 = 1 << VIRTIO_NET_F_MQ;
const CTRL_VQ: u64 = 1 << VIRTIO_NET_F_CTRL_VQ;

impl DeviceState {
    fn uses(&self, pair: u16) -> bool {
        lock(&self.pairs).is_attached(pair)
    }
}

fn device(pairs: u16) -> (Arc<SocketPort>, DeviceState) {
    let port = Arc::new(SocketPort::new(pairs).unwrap());
    let mac = Some(Mac([2, 0, 0, 0, 0, 1]));
    let identity = Identity {
        mac,
        mtu: None,
        pairs,
    };
    let state = DeviceState::new(identity, port.clone());
    (port, state)
}

#[test]
fn pairs_follow_the_control_queue() {
    // Arrange: a driver with MQ and the control queue; both receive queues run
    let (port, state) = device(2);
    state.set_features(MQ | CTRL_VQ);
    state.start_pair(0, false);
    state.start_pair(1, false);
    port.events();
    assert!(state.uses(0) && !state.uses(1));
    // Act, assert
    state.apply(Command::SetPairs(2)).unwrap();
    assert_eq!(port.events(), [Event::Attached(1, true)]);
    state.apply(Command::SetPairs(1)).unwrap();
    assert_eq!(port.events(), [Event::Attached(1, false)]);
    state.stop_pair(1);
    assert_eq!(port.events(), []);
}

#[test]
fn without_control_queue_running_is_enough() {
    let (port, state) = device(2);
    state.set_features(MQ);
    port.events();
    state.start_pair(1, false);
    assert_eq!(port.events(), [Event::Attached(1, true)]);
    state.stop_pair(1);
    assert_eq!(port.events(), [Event::Attached(1, false)]);
}

#[test]
fn a_resumed_receive_queue_was_in_use() {
    let (_, state) = device(3);
    state.set_features(MQ | CTRL_VQ);
    state.start_pair(1, true);
    assert!(state.uses(1));
    state.start_pair(2, false);
    assert!(!state.uses(2));
}

#[test]
fn the_same_features_again_keep_what_the_driver_set() {
    // Arrange
    let (port, state) = device(1);
    let features = CTRL_VQ | 1 << VIRTIO_NET_F_CTRL_RX | 1 << VIRTIO_NET_F_GUEST_CSUM;
    state.set_features(features);
    state
        .apply(Command::SetMac(Mac([2, 9, 9, 9, 9, 9])))
        .unwrap();
    state.apply(Command::Promisc(false)).unwrap();
    state.apply(Command::SetGuestOffloads(0)).unwrap();
    port.events();
    // Act
    state.set_features(features);
    // Assert
    assert_eq!(port.events(), []);
    assert_eq!(state.config()[..6], [2, 9, 9, 9, 9, 9]);
    assert!(!FilterView::new(&state).filter().passes_all());
    // Act: a reset
    state.forget_driver();
    // Assert
    assert_eq!(state.config()[..6], [2, 0, 0, 0, 0, 1]);
    assert!(FilterView::new(&state).filter().passes_all());
    assert_eq!(state.offloads(), 1 << VIRTIO_NET_F_GUEST_CSUM);
}

#[test]
fn a_view_takes_over_changes_when_refreshed() {
    let (_, state) = device(1);
    state.set_features(1 << VIRTIO_NET_F_CTRL_RX);
    let mut view = FilterView::new(&state);
    state.apply(Command::Promisc(false)).unwrap();
    assert!(view.filter().passes_all());
    view.refresh(&state);
    assert!(!view.filter().passes_all());
}

#[test]
fn a_guest_that_goes_on_is_asked_to_announce_itself_until_it_did() {
    // Arrange
    let (_, state) = device(2);
    state.set_features(CTRL_VQ | 1 << VIRTIO_NET_F_GUEST_ANNOUNCE);
    let asked = |state: &DeviceState| state.config()[6] & 2 != 0;
    // Act, assert: not one that begins
    state.start_pair(0, false);
    assert!(!asked(&state));
    state.start_pair(0, true);
    assert!(asked(&state));
    state.apply(Command::AnnounceAck).unwrap();
    assert!(!asked(&state));
    // Act, assert: once a session
    state.start_pair(1, true);
    assert!(!asked(&state));
    // Act, assert: the frontend asks, for this guest and for one that cannot
    let mac = Mac([2, 0, 0, 0, 0, 1]);
    state.announce(mac).unwrap();
    assert!(asked(&state));
    state.set_features(CTRL_VQ);
    state.announce(mac).unwrap();
    assert!(!asked(&state));
}

#[test]
fn the_frontend_may_choose_an_mtu_that_the_port_can_carry() {
    let port = Arc::new(SocketPort::new(1).unwrap());
    let identity = Identity {
        mac: None,
        mtu: Some(9000),
        pairs: 1,
    };
    let state = DeviceState::new(identity, port);
    let told = |state: &DeviceState| u16::from_le_bytes(state.config()[10..].try_into().unwrap());
    assert_eq!(told(&state), 9000);
    state.set_mtu(1400).unwrap();
    assert_eq!(told(&state), 1400);
    for wrong in [0, 67, 9001] {
        state.set_mtu(wrong).unwrap_err();
    }
    assert_eq!(told(&state), 1400);
    state.end_session();
    assert_eq!(told(&state), 9000);
}

#[test]
fn a_successor_goes_on_with_what_the_driver_had_set() {
    // Arrange
    let features = MQ
        | CTRL_VQ
        | 1 << VIRTIO_NET_F_CTRL_RX
        | 1 << VIRTIO_NET_F_GUEST_CSUM
        | 1 << VIRTIO_NET_F_GUEST_TSO4;
    let (_, state) = device(4);
    state.set_features(features);
    let csum = 1 << VIRTIO_NET_F_GUEST_CSUM;
    for command in [
        Command::SetMac(Mac([2, 9, 9, 9, 9, 9])),
        Command::Promisc(false),
        Command::SetGuestOffloads(csum),
        Command::SetPairs(3),
    ] {
        state.apply(command).unwrap();
    }
    let bytes = state.saved();
    assert!(bytes.len() <= berth_queue_worker::saved_state::MAX_STATE);
    // Act
    let (port, successor) = device(4);
    successor.set_features(features);
    port.events();
    assert!(successor.restore(&bytes));
    // Assert
    assert_eq!(successor.saved(), bytes);
    assert_eq!(port.events(), [Event::Offloads(csum)]);
    assert_eq!(successor.config()[..6], [2, 9, 9, 9, 9, 9]);
    assert!(!FilterView::new(&successor).filter().passes_all());
    // Act, assert: another driver, fewer pairs, half of it, nonsense
    let (_, other) = device(4);
    other.set_features(features & !MQ);
    assert!(!other.restore(&bytes));
    let (_, small) = device(2);
    small.set_features(features);
    assert!(!small.restore(&bytes));
    for len in 0..bytes.len() {
        assert!(!successor.restore(&bytes[..len]));
    }
    let mut more_offloads = bytes.clone();
    more_offloads[16] |= 1 << 2;
    assert!(!successor.restore(&more_offloads));
}

/// A port that no ring can be made for, as where io_uring is not allowed.
struct NoRing(SocketPort);

impl NetPort for NoRing {
    fn num_queues(&self) -> u16 {
        self.0.num_queues()
    }
    fn has_uso(&self) -> bool {
        false
    }
    fn is_roomy(&self) -> bool {
        true
    }
    fn fd(&self, _queue: u16) -> RawFd {
        -1
    }
    fn recv(&self, queue: u16, frame: &mut Frame<'_, '_>) -> io::Result<usize> {
        self.0.recv(queue, frame)
    }
    fn send(&self, queue: u16, frame: &Frame<'_, '_>) -> io::Result<usize> {
        self.0.send(queue, frame)
    }
    fn set_header_len(&self, len: usize) -> io::Result<()> {
        self.0.set_header_len(len)
    }
    fn set_offloads(&self, features: u64) -> io::Result<()> {
        self.0.set_offloads(features)
    }
    fn set_attached(&self, queue: u16, attached: bool) -> io::Result<()> {
        self.0.set_attached(queue, attached)
    }
}

#[test]
fn frames_go_one_by_one_where_no_ring_can_be_had_or_is_wanted() {
    let identity = Identity {
        mac: None,
        mtu: None,
        pairs: 1,
    };
    let port = || SocketPort::new(1).unwrap();
    let best = DeviceState::new(identity, Arc::new(port()));
    assert!(best.batcher(0, Batcher::new).is_some());
    let none = DeviceState::new(identity, Arc::new(NoRing(port())));
    assert!(none.batcher(0, Batcher::new).is_none());
    let plain = Settings {
        engine: EngineChoice::Sync,
        ..identity.into()
    };
    let plain = DeviceState::new(plain, Arc::new(port()));
    assert!(plain.batcher(0, Batcher::new).is_none());
}
