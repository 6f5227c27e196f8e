//! The rate limit, seen by a driver. That it is exact is proven where it lives, in queue-worker.

use std::time::Instant;

use berth_queue_worker::testing::TIMEOUT;

use super::*;

fn limited(image: &TempImage, engine: EngineChoice, limit: &str) -> (FakeDriver, Metrics) {
    let setup = Setup {
        num_queues: 2,
        ..Setup::default()
    };
    let config = BlkConfig {
        rate_limit: Some(limit.parse().unwrap()),
        ..config(engine)
    };
    drive_config(&image.options(), setup, &config)
}

fn add_write(driver: &mut FakeDriver, queue: usize, sector: u64, data: &[u8]) -> u64 {
    let ram = Arc::clone(&driver.ram);
    let status = ram.place(&[0xff]);
    let buffers = [
        header(&ram, VIRTIO_BLK_T_OUT, sector),
        Buffer::readable(ram.place(data), data.len() as u32),
        Buffer::writable(status, 1),
    ];
    driver.queues[queue].add(&buffers).unwrap();
    status
}

fn wait_throttled(metrics: &Metrics, queue: u16, count: u64) {
    let deadline = Instant::now() + TIMEOUT;
    while metrics.queue(queue).unwrap().throttled.get() < count {
        assert!(Instant::now() < deadline, "nothing was held back");
        std::thread::yield_now();
    }
}

#[test]
fn every_request_over_the_limit_waits_and_then_completes() {
    for engine in [EngineChoice::Auto, EngineChoice::Sync] {
        let image = TempImage::new(4 * MIB);
        // Each request is larger than the bucket, so each must wait, however slow this machine is.
        let limit = "bw_size=8192,bw_refill_time=1";
        let (mut driver, metrics) = limited(&image, engine, limit);
        const EACH: u64 = 10;
        let mut all = Vec::new();
        for queue in 0..2 {
            for n in 0..EACH {
                let at = queue as u64 * EACH + n;
                let data = pattern(16384, at as u8);
                all.push(add_write(&mut driver, queue, at * 32, &data));
            }
            driver.queues[queue].kick_if_wanted();
        }
        for queue in &mut driver.queues {
            for _ in 0..EACH {
                queue.wait_used();
            }
        }
        for (at, status) in all.into_iter().enumerate() {
            assert_eq!(driver.ram.read(status, 1), [OK]);
            assert_eq!(
                image.bytes(at as u64 * 16384, 16384),
                pattern(16384, at as u8)
            );
        }
        for queue in 0..2 {
            assert_eq!(metrics.queue(queue).unwrap().throttled.get(), EACH);
        }
        driver.finish();
    }
}

#[test]
fn queue_that_waits_for_the_limit_stops_with_nothing_lost() {
    for engine in [EngineChoice::Auto, EngineChoice::Sync] {
        let image = TempImage::new(MIB);
        // One request, and the next one tomorrow.
        let limit = "ops_size=1,ops_refill_time=86400000";
        let (mut driver, metrics) = limited(&image, engine, limit);
        let statuses: Vec<_> = (0..3)
            .map(|n| add_write(&mut driver, 0, n * 8, &pattern(4096, n as u8)))
            .collect();
        driver.queues[0].kick();
        wait_throttled(&metrics, 0, 1);
        driver.queues[0].wait_used();
        assert!(driver.queues[0].poll_used().is_none());
        // The limit is the disk's, not the queue's.
        add_write(&mut driver, 1, 80, &pattern(512, 9));
        driver.queues[1].kick();
        wait_throttled(&metrics, 1, 1);
        assert!(driver.queues[1].poll_used().is_none());

        // What was taken is finished at once, what was not is left in the ring.
        assert_eq!(driver.frontend.stop_queue(0), 2);
        driver.queues[0].wait_used();
        assert!(driver.queues[0].poll_used().is_none());
        let read = |status: &u64| driver.ram.read(*status, 1)[0];
        let answers: Vec<_> = statuses.iter().map(read).collect();
        assert_eq!(answers, [OK, OK, 0xff]);
        assert_eq!(image.bytes(4096, 4096), pattern(4096, 1));
        assert_eq!(image.bytes(8192, 4096), vec![0; 4096]);
        driver.finish();
    }
}

#[test]
fn without_a_limit_nothing_waits() {
    let image = TempImage::new(MIB);
    let (mut driver, metrics) = drive(&image.options(), Setup::default());
    for n in 0..50 {
        assert_eq!(write(&mut driver, n, &pattern(512, n as u8)), OK);
    }
    driver.finish();
    assert_eq!(metrics.queue(0).unwrap().throttled.get(), 0);
}
