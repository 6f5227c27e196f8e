//! What a frontend may change while requests are in flight: memory, and everything at once.

use std::sync::atomic::AtomicBool;

use super::*;

const LEN: u32 = 64 << 10;

/// Reads of the first MiB, one after the other in each of `gpas`.
fn add_reads(ram: &GuestRam, queue: &mut DriverQueue, gpas: &[u64], status: u64) {
    for (n, gpa) in gpas.iter().enumerate() {
        let sector = n as u64 % 16 * 128;
        let buffers = [
            header(ram, VIRTIO_BLK_T_IN, sector),
            Buffer::writable(*gpa, LEN),
            Buffer::writable(status, 1),
        ];
        queue.add(&buffers).unwrap();
    }
    queue.kick_if_wanted();
}

fn disk() -> (TempImage, Vec<u8>) {
    let image = TempImage::new(2 * MIB);
    let data = pattern(1 << 20, 9);
    image.file().write_all_at(&data, 0).unwrap();
    (image, data)
}

fn caches() -> [Cache; 2] {
    [Cache::Writeback, Cache::None]
}

#[test]
fn regions_come_and_go_while_another_queue_is_deep_in_io() {
    for cache in caches() {
        let (image, data) = disk();
        let options = OpenOptions {
            cache,
            ..image.options()
        };
        let setup = Setup {
            num_queues: 2,
            ..Setup::default()
        };
        let (mut driver, _) = drive(&options, setup);
        let FakeDriver {
            frontend,
            ram,
            queues,
            ..
        } = &mut driver;
        let (busy, own) = queues.split_at_mut(1);
        let busy = &mut busy[0];
        let gpas: Vec<u64> = (0..32).map(|_| ram.alloc(LEN.into(), 4096)).collect();
        let status = ram.alloc(1, 1);
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let load = scope.spawn(|| {
                let mut rounds = 0;
                while !stop.load(Ordering::Relaxed) && rounds < 2000 {
                    add_reads(ram, busy, &gpas, status);
                    for _ in &gpas {
                        busy.wait_used();
                    }
                    rounds += 1;
                }
                rounds
            });
            for round in 0..60u64 {
                let region = GuestRam::new(0x9_0000_0000 + (round << 24), 0x2_0010);
                assert_eq!(frontend.add_mem_reg(&region.info(), region.fd()), 0);
                let gpa = region.alloc(LEN.into(), 512);
                let sector = round % 16 * 128;
                let buffer = Buffer::writable(gpa, LEN);
                let code = request(ram, &mut own[0], VIRTIO_BLK_T_IN, sector, &[buffer]);
                assert_eq!(code, OK);
                let at = sector as usize * 512;
                assert!(region.read(gpa, LEN as usize) == data[at..at + LEN as usize]);
                assert_eq!(frontend.rem_mem_reg(&region.info()), 0);
                region.truncate();
            }
            stop.store(true, Ordering::Relaxed);
            assert!(load.join().unwrap() > 0);
        });
        for (n, gpa) in gpas.iter().enumerate() {
            let at = n % 16 * LEN as usize;
            assert!(driver.ram.read(*gpa, LEN as usize) == data[at..at + LEN as usize]);
        }
        driver.finish();
    }
}

#[test]
fn reset_in_the_middle_of_io_leaves_memory_alone_afterwards() {
    for cache in caches() {
        let (image, data) = disk();
        let options = OpenOptions {
            cache,
            ..image.options()
        };
        let (mut driver, _) = drive(&options, Setup::default());
        let ram = Arc::clone(&driver.ram);
        let gpas: Vec<u64> = (0..32).map(|_| ram.alloc(LEN.into(), 4096)).collect();
        let status = ram.alloc(1, 1);
        for _ in 0..20 {
            add_reads(&ram, &mut driver.queues[0], &gpas, status);
            let reset = FrontendReq::RESET_DEVICE;
            driver.frontend.request(reset, &[], &[]);
            // A read that is still on its way would show.
            for gpa in &gpas {
                ram.slice(*gpa, LEN as usize)
                    .fill(0, LEN as usize, 0xee)
                    .unwrap();
            }
            let features = driver.frontend.negotiate(u64::MAX);
            driver.queues[0].reset();
            driver.frontend.start_queue(&driver.queues[0], 0, features);
            let (code, bytes) = read(&mut driver, 128, 4096);
            assert_eq!(code, OK);
            assert!(bytes == data[LEN as usize..LEN as usize + 4096]);
            for gpa in &gpas {
                assert!(ram.read(*gpa, LEN as usize).iter().all(|b| *b == 0xee));
            }
        }
        driver.finish();
    }
}
