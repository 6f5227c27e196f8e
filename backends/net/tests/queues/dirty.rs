//! All that the card writes into guest memory is in the dirty log: frames, headers, answers to commands,
//! and frames that were read into a buffer and then were not for the guest.

use berth_queue_worker::testing::{Buffer, LogWatch};
use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;

use crate::guest::{Guest, OWN, PLAIN, RX, TX, frame};

const OTHER: [u8; 6] = [2, 0, 0, 0, 0, 9];

/// xorshift: the same frames in every run.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}

/// Fills the receive ring with buffers.
fn fill(guest: &mut Guest, buffer_len: u32, area: u64, random: &mut Random) {
    loop {
        let gpa = area + random.below(1 << 20);
        let buffer = Buffer::writable(gpa, buffer_len);
        if guest.driver.queues[RX].add(&[buffer]).is_none() {
            return;
        }
    }
}

/// Frames of random lengths to us and to others, in both directions, and commands.
fn random_frames(mut guest: Guest, buffer_len: u32, longest: u64, seed: u64) {
    let mut random = Random(seed);
    assert_eq!(guest.command(&[0, 0, 0]), 0, "promiscuous mode is off");
    let area = guest
        .driver
        .ram
        .alloc((1 << 20) + u64::from(buffer_len), 4096);
    let out = frame(PLAIN, OTHER, 300, 1);
    let out = guest.driver.ram.place(&out);
    let command = guest.driver.ram.place(&[0, 1, 1]);
    let watch = LogWatch::start(&mut guest.driver);
    let counters = guest.metrics.queue(0).unwrap().clone();
    let control = guest.driver.queues.len() - 1;
    let mut expected = counters.requests.get();
    for round in 0..40u8 {
        watch.pause(&mut guest.driver);
        fill(&mut guest, buffer_len, area, &mut random);
        let answer = area + random.below(1 << 20);
        let port = guest.port.clone();
        watch.run(&mut guest.driver, |driver| {
            for seed in 0..1 + random.below(8) {
                let to = if random.below(3) == 0 { OTHER } else { OWN };
                let len = 60 + random.below(longest - 60) as usize;
                let bytes = frame(PLAIN, to, len, round ^ seed as u8);
                port.inject(0, &bytes).unwrap();
                expected += u64::from(to == OWN);
            }
            // Without it, a frame for others may not have been read when the rings are paused.
            port.inject(0, &frame(PLAIN, OWN, 64, round)).unwrap();
            expected += 1;
            driver.queues[TX].run(&[Buffer::readable(out, 300)]);
            driver.queues[control]
                .run(&[Buffer::readable(command, 3), Buffer::writable(answer, 1)]);
            while counters.requests.get() < expected {
                driver.queues[RX].wait_used();
            }
        });
        while guest.driver.queues[RX].poll_used().is_some() {}
        let _ = guest.sent();
    }
    assert!(counters.bytes_to_guest.get() > 0);
    guest.driver.finish();
}

#[test]
fn every_byte_that_the_card_wrote_is_in_the_dirty_log() {
    random_frames(Guest::new(1, &[], 64), 1536, 9000, 1);
    random_frames(Guest::on_roomy(&[], 64), 1536, 1514, 2);
    random_frames(Guest::on_roomy(&[], 128), 512, 3000, 3);
    let one_buffer = [VIRTIO_NET_F_MRG_RXBUF];
    random_frames(Guest::new(1, &one_buffer, 64), 9100, 9000, 4);
}
