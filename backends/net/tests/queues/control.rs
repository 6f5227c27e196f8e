//! The control queue, the configuration space, and which pairs are in use.

use berth_net::port::testing::Event;
use berth_queue_worker::testing::Buffer;
use virtio_bindings::virtio_net::{VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_MQ};

use crate::guest::{Guest, OWN, PLAIN, RX, frame};

#[test]
fn control_commands_change_filter_and_address() {
    // Arrange
    let mut guest = Guest::new(1, &[], 128);
    let buffers = guest.post(8, 2048);
    let new_mac = [2, 7, 7, 7, 7, 7];
    let to_other = frame(PLAIN, [2, 9, 9, 9, 9, 9], 80, 1);
    // Act: promiscuous mode off, and another address
    assert_eq!(guest.command(&[0, 0, 0]), 0);
    assert_eq!(guest.command(&[&[1, 1], &new_mac[..]].concat()), 0);
    guest.port.inject(0, &to_other).unwrap();
    guest.port.inject(0, &frame(PLAIN, OWN, 90, 2)).unwrap();
    guest
        .port
        .inject(0, &frame(PLAIN, new_mac, 100, 3))
        .unwrap();
    // Assert: only the last one arrives, and the configuration space follows
    assert_eq!(guest.driver.queues[RX].wait_used().1, 100);
    let got = guest.driver.ram.read(buffers[0], 100);
    assert!(got[12..] == frame(PLAIN, new_mac, 100, 3)[12..]);
    assert_eq!(guest.driver.frontend.get_config(0, 6), new_mac);
    // Act: promiscuous again
    assert_eq!(guest.command(&[0, 0, 1]), 0);
    guest.port.inject(0, &to_other).unwrap();
    assert_eq!(guest.driver.queues[RX].wait_used().1, 80);
}

#[test]
fn control_commands_that_are_wrong_get_an_error() {
    let mut guest = Guest::new(1, &[], 128);
    for bad in [
        &[][..],
        &[0],
        &[9, 9, 9],
        &[4, 0, 1, 0],
        &[2, 0, 0xff, 0xff],
        &[0, 0, 1, 1],
    ] {
        assert_eq!(guest.command(bad), 1, "{bad:?}");
    }
    assert_eq!(guest.command(&vec![0; 70_000]), 1);
    // No room for the answer
    let command = guest.readable(&[0, 0, 1]);
    assert_eq!(guest.driver.queues[2].run(&[command]), 0);
    assert_eq!(guest.command(&[0, 0, 1]), 0, "and the queue lives on");
}

#[test]
fn pairs_are_attached_on_command() {
    // Arrange
    let mut guest = Guest::new(2, &[], 128);
    let events = guest.port.events();
    assert!(!events.iter().any(|e| matches!(e, Event::Attached(1, _))));
    // Act, assert
    assert_eq!(guest.command(&[4, 0, 2, 0]), 0);
    guest.port.wait_for(Event::Attached(1, true));
    assert_eq!(guest.command(&[4, 0, 3, 0]), 1, "there are two pairs");
    assert_eq!(guest.command(&[4, 0, 1, 0]), 0);
    guest.port.wait_for(Event::Attached(1, false));
}

#[test]
fn guest_offloads_reach_the_port() {
    let mut guest = Guest::new(1, &[], 128);
    let csum_only = 1_u64 << VIRTIO_NET_F_GUEST_CSUM;
    assert_eq!(
        guest.command(&[&[5, 0], &csum_only.to_le_bytes()[..]].concat()),
        0
    );
    // Behind it there may be the pair's worker, which starts in its own time.
    let events = guest.port.events();
    assert!(events.contains(&Event::Offloads(csum_only)), "{events:?}");
}

#[test]
fn without_mq_the_control_queue_is_number_two() {
    let mut guest = Guest::new(2, &[VIRTIO_NET_F_MQ], 128);
    let command = guest.readable(&[0, 0, 1]);
    let answer = guest.driver.ram.place(&[0xee]);
    assert_eq!(
        guest.driver.queues[2].run(&[command, Buffer::writable(answer, 1)]),
        1
    );
    assert_eq!(guest.driver.ram.read(answer, 1), [0]);
    // Behind it there is nothing
    guest.driver.queues[4].wait_err();
}

#[test]
fn without_control_queue_every_pair_that_runs_is_attached() {
    let guest = Guest::new(2, &[VIRTIO_NET_F_CTRL_VQ], 128);
    let mut guest = guest;
    // Pair 1 receives: its worker has started
    let gpa = guest.driver.ram.alloc(2048, 16);
    guest.driver.queues[2]
        .add(&[Buffer::writable(gpa, 2048)])
        .unwrap();
    guest.driver.queues[2].kick_if_wanted();
    guest.port.inject(1, &frame(PLAIN, OWN, 77, 1)).unwrap();
    assert_eq!(guest.driver.queues[2].wait_used().1, 77);
    guest.port.wait_for(Event::Attached(1, true));
    // A frontend that disables the ring takes the pair out of use, as QEMU does
    guest.driver.frontend.set_enable(2, false);
    // Pair 0 may have started only now.
    let events = guest.port.events();
    assert!(events.contains(&Event::Attached(1, false)), "{events:?}");
    assert!(!events.contains(&Event::Attached(0, false)), "{events:?}");
}

#[test]
fn a_frontend_may_choose_the_address() {
    let mut guest = Guest::new(1, &[], 128);
    let mac = [0x52, 0x54, 0, 1, 2, 3];
    assert_eq!(guest.driver.frontend.set_config(0, &mac), 0);
    assert_eq!(guest.driver.frontend.get_config(0, 6), mac);
    assert_ne!(
        guest.driver.frontend.set_config(0, &[1, 0, 0, 0, 0, 1]),
        0,
        "multicast"
    );
    assert_ne!(
        guest.driver.frontend.set_config(6, &[0, 0]),
        0,
        "status is read-only"
    );
    assert_eq!(guest.driver.frontend.get_config(6, 6), [1, 0, 1, 0, 0, 0]);
}
