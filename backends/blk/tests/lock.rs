//! The image's lock while a queue runs, and its way from one daemon to the next.
#![allow(clippy::unwrap_used, missing_docs)]

mod support;

use std::sync::Arc;

use berth_queue_worker::testing::{Buffer, FakeDriver, Setup};
use support::{Daemon, TempDir};

const MIB: u64 = 1 << 20;

/// Writes a sector, reads it back.
fn write_and_read(driver: &mut FakeDriver, queue: usize, fill: u8) {
    let ram = Arc::clone(&driver.ram);
    let header = |kind: u32| [&kind.to_le_bytes()[..], &[0; 12]].concat();
    let status = ram.alloc(1, 1);
    let (write, read) = (ram.place(&header(1)), ram.place(&header(0)));
    let (from, to) = (ram.place(&[fill; 512]), ram.alloc(512, 512));
    driver.queues[queue].run(&[
        Buffer::readable(write, 16),
        Buffer::readable(from, 512),
        Buffer::writable(status, 1),
    ]);
    assert_eq!(ram.read(status, 1), [0]);
    driver.queues[queue].run(&[
        Buffer::readable(read, 16),
        Buffer::writable(to, 512),
        Buffer::writable(status, 1),
    ]);
    assert_eq!(ram.read(status, 1), [0]);
    assert_eq!(ram.read(to, 512), [fill; 512]);
}

fn two_queues() -> Setup {
    Setup {
        num_queues: 2,
        ..Setup::default()
    }
}

#[test]
fn image_is_handed_over_when_the_last_queue_stops() {
    let dir = TempDir::new();
    let image = dir.image("disk.img", MIB);
    // Who holds a lock cannot be seen from within the sandbox.
    let flags = ["--lock=running", "--num-queues=2", "--sandbox=off"];
    let (first, second) = (dir.path("first.sock"), dir.path("second.sock"));
    let mut source = Daemon::serve(&first, &image, &flags);
    let mut destination = Daemon::serve(&second, &image, &flags);
    let mut old = FakeDriver::connect(&first, two_queues());
    write_and_read(&mut old, 0, 1);
    write_and_read(&mut old, 1, 2);

    // Too early: queues run at the source, then one still does.
    let early = FakeDriver::connect(&second, two_queues());
    early.queues[0].wait_err();
    destination.wait_for(&format!("in use by process {}", source.pid()));
    early.finish();
    old.frontend.stop_queue(0);
    let early = FakeDriver::connect(&second, two_queues());
    early.queues[1].wait_err();
    early.finish();

    old.frontend.stop_queue(1);
    let mut new = FakeDriver::connect(&second, two_queues());
    write_and_read(&mut new, 0, 3);
    // The source's frontend thinks again, and has to leave it to the destination.
    let features = old.features;
    old.frontend.start_queue(&old.queues[0], 0, features);
    old.queues[0].wait_err();
    source.wait_for("in use by process");
    old.finish();
    // Answered when the image is free.
    new.frontend.stop_queue(0);
    new.frontend.stop_queue(1);
    // Nobody needs it any more.
    let mut old = FakeDriver::connect(&first, two_queues());
    write_and_read(&mut old, 0, 4);
    old.finish();
    new.finish();
    source.terminate();
    destination.terminate();
}

#[test]
fn image_that_is_always_locked_is_not_to_be_had_between_two_queues() {
    let dir = TempDir::new();
    let image = dir.image("disk.img", MIB);
    let (first, second) = (dir.path("first.sock"), dir.path("second.sock"));
    let always = Daemon::serve(&first, &image, &[]);
    let mut running = Daemon::serve(&second, &image, &["--lock=running", "--sandbox=off"]);
    let driver = FakeDriver::connect(&second, Setup::default());
    driver.queues[0].wait_err();
    running.wait_for(&format!("in use by process {}", always.pid()));
    driver.finish();
    drop(always);
    let mut driver = FakeDriver::connect(&second, Setup::default());
    write_and_read(&mut driver, 0, 1);
    driver.finish();
    running.terminate();
}

#[test]
fn destination_that_comes_early_waits_in_its_sandbox_for_the_image() {
    let dir = TempDir::new();
    let image = dir.image("disk.img", MIB);
    let flags = ["--lock=running", "--num-queues=2"];
    let (first, second) = (dir.path("first.sock"), dir.path("second.sock"));
    let source = Daemon::serve(&first, &image, &flags);
    let mut destination = Daemon::serve(&second, &image, &flags);
    let mut old = FakeDriver::connect(&first, two_queues());
    write_and_read(&mut old, 0, 1);
    let mut new = FakeDriver::connect(&second, two_queues());
    destination.wait_for("the image is still locked");
    write_and_read(&mut old, 1, 2);
    old.frontend.stop_queue(0);
    old.frontend.stop_queue(1);
    write_and_read(&mut new, 0, 3);
    new.finish();
    old.finish();
    source.terminate();
    destination.terminate();
}
