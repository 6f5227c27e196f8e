//! The real daemon on real taps, each test in a network namespace of its own.
//!
//! The guest's side is the fake driver, the host's side a packet socket on the tap. Where there is
//! no right to make a namespace, or no /dev/net/tun, the tests say 'skipped'.
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

mod support;

use std::io::Read as _;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use berth_queue_worker::protocol::message::FrontendReq;
use support::guest::{ETH, Guest, HDR, frame, tcp, tso4};
use support::{
    Daemon, PacketSocket, SocketPath, VNET_HDR, attach, describe, ended_by, exists, in_namespace,
    ip, wait_until_gone,
};
use virtio_bindings::virtio_net::{VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4};

/// For local experiments: nobody on the host answers or sends it.
const EXPERIMENT: u16 = 0x88b5;
const IPV4: u16 = 0x0800;
const GUEST: [u8; 6] = [0x52, 0x54, 0, 0x12, 0x34, 0x56];
const HOST: [u8; 6] = [2, 0, 0, 0, 0, 0xfe];
const MAC: &str = "--mac=52:54:00:12:34:56";
/// A plain frame's header towards the packet socket.
const PLAIN: [u8; 10] = [0; 10];

/// A frame behind the guest's header.
fn from_guest(header: [u8; 10], frame: &[u8]) -> Vec<u8> {
    [&header[..], &[0, 0], frame].concat()
}

/// A frame behind the packet socket's header.
fn from_host(header: [u8; 10], frame: &[u8]) -> Vec<u8> {
    [&header[..], frame].concat()
}

/// Makes tap0 with these options, and a daemon on it with these arguments. The tap comes up last:
/// one that is up and gets its carrier later drops frames until the kernel's next look at links.
fn start_on_tap(options: &str, args: &[&str]) -> Daemon {
    ip(&format!("tuntap add tap0 mode tap {options}"));
    let daemon = Daemon::start(&[&["--tap=tap0"], args].concat());
    ip("link set tap0 up");
    daemon
}

#[test]
fn frames_go_in_and_out_of_an_existing_tap() {
    in_namespace(|| {
        // Arrange
        let daemon = start_on_tap("", &[MAC]);
        let host = PacketSocket::new("tap0", EXPERIMENT);
        let mut guest = Guest::connect(daemon.socket(), 1, &[]);
        guest.post(0, 64);
        assert_eq!(
            guest.driver.frontend.get_config(0, 10)[..8],
            [&GUEST[..], &[1, 0]].concat()
        );
        // Act: out
        let out = frame(HOST, GUEST, EXPERIMENT, 200);
        guest.send(0, &from_guest(PLAIN, &out));
        // Assert
        assert!(host.receive()[10..] == out);
        // Act: in
        for len in [60, 1514, 77] {
            let sent = frame(GUEST, HOST, EXPERIMENT, len);
            host.send(&from_host(PLAIN, &sent));
            // Assert
            assert!(guest.receive(0)[HDR..] == sent, "{len} bytes");
        }
        // Act: the end
        let status = daemon.end(libc::SIGTERM);
        // Assert: the tap was there before, so it is there after
        assert!(status.success());
        assert!(exists("tap0"));
    });
}

#[test]
fn segmentation_is_left_to_the_host_when_the_guest_sends() {
    in_namespace(|| {
        let daemon = start_on_tap("", &[]);
        let host = PacketSocket::new("tap0", IPV4);
        let mut guest = Guest::connect(daemon.socket(), 1, &[]);
        let long = tcp(HOST, GUEST, (1000, 2000), 65_000);
        guest.send(0, &from_guest(tso4(1448), &long));
        let got = host.receive();
        assert_eq!(got[1], 1, "gso_type");
        assert_eq!(got[4..6], 1448_u16.to_le_bytes(), "gso_size");
        assert!(got[10..] == long);
    });
}

#[test]
fn long_segments_reach_a_guest_that_takes_them() {
    in_namespace(|| {
        // Arrange
        let daemon = start_on_tap("", &[]);
        let host = PacketSocket::new("tap0", IPV4);
        let mut guest = Guest::connect(daemon.socket(), 1, &[]);
        guest.post(0, 250);
        for len in [65_535, 20_000, 40_000] {
            // Act
            let long = tcp(GUEST, HOST, (1000, 2000), len);
            host.send(&from_host(tso4(1448), &long));
            // Assert
            let got = guest.receive(0);
            assert_eq!(got[..2], [1, 1], "NEEDS_CSUM, TCPV4");
            assert_eq!(got[4..6], 1448_u16.to_le_bytes(), "gso_size");
            assert_eq!(
                usize::from(got[10]),
                (HDR + len).div_ceil(1536),
                "num_buffers"
            );
            assert!(got[HDR..] == long, "{len} bytes");
        }
    });
}

#[test]
fn the_host_cuts_segments_for_a_guest_that_does_not_take_long_ones() {
    in_namespace(|| {
        // Arrange
        let daemon = start_on_tap("", &[]);
        let host = PacketSocket::new("tap0", IPV4);
        let mut guest = Guest::connect(daemon.socket(), 1, &[VIRTIO_NET_F_GUEST_TSO4]);
        guest.post(0, 250);
        // Act
        let (len, payload) = (30_054, 30_000_usize);
        host.send(&from_host(tso4(1000), &tcp(GUEST, HOST, (1000, 2000), len)));
        // Assert
        for n in 0..payload.div_ceil(1000) {
            let got = guest.receive(0);
            assert_eq!(got.len(), HDR + 1054, "segment {n}");
            assert_eq!(got[1], 0, "gso_type");
        }
    });
}

#[test]
fn offloads_change_while_the_guest_runs() {
    in_namespace(|| {
        // Arrange
        let daemon = start_on_tap("", &[]);
        let host = PacketSocket::new("tap0", IPV4);
        let mut guest = Guest::connect(daemon.socket(), 1, &[]);
        guest.post(0, 250);
        let long = from_host(tso4(1000), &tcp(GUEST, HOST, (1000, 2000), 5054));
        // Act: receive checksum offload only
        let csum = 1_u64 << VIRTIO_NET_F_GUEST_CSUM;
        assert!(guest.command(&[&[5, 0], &csum.to_le_bytes()[..]].concat()));
        host.send(&long);
        // Assert
        for _ in 0..5 {
            assert_eq!(guest.receive(0).len(), HDR + 1054);
        }
        // Act: and TSO again
        let tso = csum | 1 << VIRTIO_NET_F_GUEST_TSO4;
        assert!(guest.command(&[&[5, 0], &tso.to_le_bytes()[..]].concat()));
        host.send(&long);
        // Assert
        assert_eq!(guest.receive(0).len(), HDR + 5054);
    });
}

#[test]
fn hostile_headers_cost_their_frame_only() {
    in_namespace(|| {
        let daemon = start_on_tap("", &[]);
        let host = PacketSocket::new("tap0", EXPERIMENT);
        let mut guest = Guest::connect(daemon.socket(), 1, &[]);
        let good = frame(HOST, GUEST, EXPERIMENT, 100);
        for hostile in [
            [1, 0, 0xff, 0xff, 0, 0, 0xff, 0xff, 0xff, 0xff],
            [1, 1, 54, 0, 0, 0, 34, 0, 16, 0],
            [1, 0x85, 54, 0, 1, 0, 34, 0, 16, 0],
            [0xff; 10],
        ] {
            guest.send(0, &from_guest(hostile, &good));
        }
        guest.send(0, &from_guest(PLAIN, &[0; 5]));
        guest.send(0, &from_guest(PLAIN, &good));
        assert!(host.receive()[10..] == good);
    });
}

#[test]
fn frames_wait_in_the_tap_for_receive_buffers() {
    in_namespace(|| {
        let daemon = start_on_tap("", &[]);
        let host = PacketSocket::new("tap0", EXPERIMENT);
        let mut guest = Guest::connect(daemon.socket(), 1, &[]);
        for len in 100..300 {
            host.send(&from_host(PLAIN, &frame(GUEST, HOST, EXPERIMENT, len)));
        }
        for batch in 0..10 {
            guest.post(0, 20);
            for n in 0..20 {
                let len = 100 + 20 * batch + n;
                assert_eq!(guest.receive(0).len(), HDR + len);
            }
        }
    });
}

#[test]
fn frames_that_the_tap_has_no_room_for_are_counted() {
    in_namespace(|| {
        // Arrange: room for ten, and a guest that gives no buffers
        let metrics = SocketPath::new();
        let metrics_arg = format!("--metrics-socket={}", metrics.display());
        let daemon = start_on_tap("", &[&metrics_arg]);
        ip("link set tap0 txqueuelen 10");
        let host = PacketSocket::new("tap0", EXPERIMENT);
        let mut guest = Guest::connect(daemon.socket(), 1, &[]);
        // Act
        for _ in 0..100 {
            host.send(&from_host(PLAIN, &frame(GUEST, HOST, EXPERIMENT, 90)));
        }
        // Assert
        let mut text = String::new();
        let mut stream = UnixStream::connect(&*metrics).unwrap();
        stream.read_to_string(&mut text).unwrap();
        let line = "berth_host_dropped_total{device=\"net\"} 90\n";
        assert!(text.contains(line), "{text}");
        guest.post(0, 10);
        for _ in 0..10 {
            assert_eq!(guest.receive(0).len(), HDR + 90);
        }
    });
}

#[test]
fn one_pair_on_a_multi_queue_tap() {
    in_namespace(|| {
        let daemon = start_on_tap("multi_queue", &[]);
        let host = PacketSocket::new("tap0", EXPERIMENT);
        let mut guest = Guest::connect(daemon.socket(), 1, &[]);
        guest.post(0, 8);
        host.send(&from_host(PLAIN, &frame(GUEST, HOST, EXPERIMENT, 90)));
        assert_eq!(guest.receive(0).len(), HDR + 90);
    });
}

#[test]
fn flows_go_to_the_pairs_that_the_guest_uses() {
    in_namespace(|| {
        // Arrange: two pairs, both with buffers; the guest uses one
        let daemon = start_on_tap("multi_queue", &["--num-queues=2"]);
        let host = PacketSocket::new("tap0", IPV4);
        let mut guest = Guest::connect(daemon.socket(), 2, &[]);
        guest.post(0, 100);
        guest.post(1, 100);
        let to_guest = |port| {
            let mut bytes = tcp(GUEST, HOST, (port, 80), 200);
            // Addresses the other way round, so that it is the same flow
            bytes[ETH + 12..ETH + 20].copy_from_slice(&[10, 9, 8, 2, 10, 9, 8, 1]);
            from_host([1, 0, 0, 0, 0, 0, 34, 0, 16, 0], &bytes)
        };
        let flows = 5000..5020;
        // Act, assert: what is sent on an unused pair goes out all the same
        let early = tcp(HOST, GUEST, (80, 4999), 200);
        guest.send(1, &from_guest([1, 0, 0, 0, 0, 0, 34, 0, 16, 0], &early));
        assert!(host.receive()[10..] == early);
        // Act, assert: everything arrives on pair 0
        for port in flows.clone() {
            host.send(&to_guest(port));
            assert_eq!(guest.receive(0).len(), HDR + 200);
        }
        // Act: use both, and send each flow on pair 1
        assert!(guest.command(&[4, 0, 2, 0]));
        for port in flows.clone() {
            let bytes = tcp(HOST, GUEST, (80, port), 200);
            guest.send(1, &from_guest([1, 0, 0, 0, 0, 0, 34, 0, 16, 0], &bytes));
            host.receive();
        }
        // Assert: the tap sends the flows back there
        for port in flows.clone() {
            host.send(&to_guest(port));
            assert_eq!(guest.receive(1).len(), HDR + 200);
        }
        // Act: one pair again
        assert!(guest.command(&[4, 0, 1, 0]));
        // Assert
        for port in flows {
            host.send(&to_guest(port));
            assert_eq!(guest.receive(0).len(), HDR + 200);
        }
        assert!(!guest.has_received(1));
    });
}

#[test]
fn a_created_tap_is_up_and_goes_with_the_daemon() {
    in_namespace(|| {
        for signal in [libc::SIGTERM, libc::SIGKILL] {
            // Act
            let daemon = Daemon::start(&["--tap=new0", "--create", "--mtu=9000", "--num-queues=2"]);
            // Assert
            let link = describe("new0");
            assert!(link.contains("mtu 9000") && link.contains(",UP"), "{link}");
            assert!(link.contains("multi_queue numqueues"), "{link}");
            let mut guest = Guest::connect(daemon.socket(), 2, &[]);
            assert_eq!(guest.driver.frontend.get_config(8, 4), [2, 0, 0x28, 0x23]);
            // Act
            let status = daemon.end(signal);
            // Assert
            assert!(status.success() || ended_by(status, libc::SIGKILL));
            wait_until_gone("new0");
        }
    });
}

#[test]
fn a_tap_of_a_daemon_that_was_killed_is_waited_for() {
    in_namespace(|| {
        ip("tuntap add tap0 mode tap");
        for _ in 0..5 {
            // Act: in the middle of its work, with a ring for each queue
            let daemon = Daemon::start(&["--tap=tap0"]);
            ip("link set tap0 up");
            let mut guest = Guest::connect(daemon.socket(), 1, &[]);
            guest.post(0, 64);
            guest.send(0, &from_guest(PLAIN, &frame(HOST, GUEST, EXPERIMENT, 200)));
            assert!(ended_by(daemon.end(libc::SIGKILL), libc::SIGKILL));
            // Assert: the next one starts
        }
    });
}

#[test]
fn what_the_driver_has_set_outlives_the_daemon() {
    in_namespace(|| {
        // Arrange: the guest has another address, a filter, and takes no long segments
        let daemon = start_on_tap("", &[MAC]);
        let mut guest = Guest::connect(daemon.socket(), 1, &[]);
        guest.post(0, 100);
        let own = [2, 7, 7, 7, 7, 7];
        let csum = 1_u64 << VIRTIO_NET_F_GUEST_CSUM;
        assert!(guest.command(&[0, 0, 0]), "promiscuous mode off");
        assert!(guest.command(&[&[1, 1], &own[..]].concat()));
        assert!(guest.command(&[&[5, 0], &csum.to_le_bytes()[..]].concat()));
        // Act
        assert!(ended_by(daemon.end(libc::SIGKILL), libc::SIGKILL));
        let daemon = Daemon::start(&["--tap=tap0", MAC]);
        guest.driver.reconnect(daemon.socket());
        daemon.wait_for_line("the guest goes on");
        // Assert: its address, its filter, its offloads
        assert_eq!(guest.driver.frontend.get_config(0, 6), own);
        ip("link set tap0 down");
        ip("link set tap0 up");
        let host = PacketSocket::new("tap0", IPV4);
        let long = |to| from_host(tso4(1000), &tcp(to, HOST, (1000, 2000), 3054));
        host.send(&long(GUEST));
        host.send(&long(own));
        for _ in 0..3 {
            let got = guest.receive(0);
            assert_eq!(got.len(), HDR + 1054);
            assert_eq!(got[HDR..HDR + 6], own);
        }
    });
}

#[test]
fn create_takes_a_tap_that_is_there_and_leaves_it() {
    in_namespace(|| {
        let daemon = start_on_tap("", &["--create"]);
        daemon.end(libc::SIGTERM);
        assert!(exists("tap0"));
    });
}

#[test]
fn the_guest_hears_of_the_link() {
    in_namespace(|| {
        // Arrange
        let daemon = start_on_tap("", &[]);
        let mut guest = Guest::connect(daemon.socket(), 1, &[]);
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_read_timeout(Some(Duration::from_secs(20)))
            .unwrap();
        let frontend = &mut guest.driver.frontend;
        frontend.request(FrontendReq::SET_BACKEND_REQ_FD, &[], &[theirs.as_fd()]);
        let mut status_after = |change: &str| {
            ip(change);
            let mut message = [0; 12];
            std::io::Read::read_exact(&mut &ours, &mut message).unwrap();
            // VHOST_USER_BACKEND_CONFIG_CHANGE_MSG
            assert_eq!(message[..4], 2_u32.to_ne_bytes());
            frontend.get_config(6, 2)
        };
        // Act, assert
        assert_eq!(status_after("link set tap0 down"), [0, 0]);
        assert_eq!(status_after("link set tap0 up"), [1, 0]);
        assert_eq!(status_after("link del tap0"), [0, 0]);
    });
}

#[test]
fn a_frontend_that_cannot_hear_of_the_link_sees_it_up() {
    in_namespace(|| {
        let daemon = start_on_tap("", &[]);
        let mut guest = Guest::connect(daemon.socket(), 1, &[]);
        ip("link set tap0 down");
        daemon.wait_for_line("link changed");
        assert_eq!(guest.driver.frontend.get_config(6, 2), [1, 0]);
    });
}

#[test]
fn a_tap_that_is_removed_does_not_keep_the_daemon_busy() {
    in_namespace(|| {
        // Arrange
        let daemon = start_on_tap("", &[]);
        let mut guest = Guest::connect(daemon.socket(), 1, &[]);
        guest.post(0, 8);
        // Act
        ip("link del tap0");
        daemon.wait_for_line("tap has been removed");
        let before = daemon.cpu_ticks();
        // Assert: frames are dropped; the queues go on, and sleep in between
        for _ in 0..100 {
            guest.send(0, &from_guest(PLAIN, &frame(HOST, GUEST, EXPERIMENT, 100)));
        }
        assert!(daemon.cpu_ticks() - before < 20);
        assert!(guest.command(&[0, 0, 1]));
    });
}

#[test]
fn the_frontend_has_the_guest_announced() {
    in_namespace(|| {
        let daemon = start_on_tap("", &[]);
        let host = PacketSocket::new("tap0", 0x8035);
        let mut guest = Guest::connect(daemon.socket(), 1, &[]);
        let payload = [&GUEST[..], &[0, 0]].concat();
        guest
            .driver
            .frontend
            .request(FrontendReq::SEND_RARP, &payload, &[]);
        let got = host.receive();
        assert_eq!(got[10..16], [0xff; 6]);
        assert_eq!(got[16..22], GUEST);
        assert_eq!(got.len(), 10 + 60);
    });
}

#[test]
fn a_tap_handed_over_by_descriptor() {
    in_namespace(|| {
        // Arrange: the daemon's standard input is the tap
        ip("tuntap add tap0 mode tap");
        let daemon = Daemon::start_with_stdin(&["--tap-fd=0"], attach("tap0", VNET_HDR).into());
        ip("link set tap0 up");
        let host = PacketSocket::new("tap0", EXPERIMENT);
        let mut guest = Guest::connect(daemon.socket(), 1, &[]);
        guest.post(0, 8);
        // Act, assert
        host.send(&from_host(PLAIN, &frame(GUEST, HOST, EXPERIMENT, 90)));
        assert_eq!(guest.receive(0).len(), HDR + 90);
        let out = frame(HOST, GUEST, EXPERIMENT, 200);
        guest.send(0, &from_guest(PLAIN, &out));
        assert!(host.receive()[10..] == out);
    });
}

#[test]
fn a_second_guest_is_served_after_the_first() {
    in_namespace(|| {
        let daemon = start_on_tap("", &[MAC]);
        let host = PacketSocket::new("tap0", EXPERIMENT);
        let mut first = Guest::connect(daemon.socket(), 1, &[]);
        first.post(0, 8);
        assert!(first.command(&[0, 0, 0]), "promiscuous mode off");
        assert!(first.command(&[1, 1, 2, 9, 9, 9, 9, 9]), "another address");
        first.driver.finish();
        let mut second = Guest::connect(daemon.socket(), 1, &[]);
        second.post(0, 8);
        assert_eq!(second.driver.frontend.get_config(0, 6), GUEST);
        host.send(&from_host(PLAIN, &frame(HOST, GUEST, EXPERIMENT, 90)));
        assert_eq!(second.receive(0).len(), HDR + 90);
    });
}
