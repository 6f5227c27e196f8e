//! Devices that reach a part of guest memory only.

use super::*;
use crate::config::Mergeable;
use crate::memory::Mode;

const ACCESS_PLATFORM: u64 = 1 << 33;
const SIZE_MAX: u64 = 1 << 1;
const WINDOW: u64 = 2 << 20;
const ABOVE: u64 = 1 << 32;

fn windowed() -> Bench {
    reaching(Dma::Auto)
}

fn reaching(dma: Dma) -> Bench {
    let memory = MemoryConfig {
        mergeable: Mergeable::Eligible,
        ..MemoryConfig::of(6 << 20)
    };
    let ram = GuestRam::with_mode(&memory, Mode::Window { len: WINDOW }).unwrap();
    let frontends = Frontends::with_operation_limit(LIMIT).unwrap();
    bench_reaching(frontends, ram, dma, |_| ())
}

/// The size of the file that a backend was given last, and what it is called.
fn given(backend: &Backend) -> (u64, String) {
    use std::os::fd::AsRawFd;
    let file = backend.seen.file(SET_MEM_TABLE);
    let link = format!("/proc/self/fd/{}", file.as_raw_fd());
    let name = std::fs::read_link(link).unwrap().display().to_string();
    (file.metadata().unwrap().len(), name)
}

/// The backend offers bit 33 of its own too: that is nothing to the guest, and nothing comes back of it.
#[test]
fn a_backend_maps_the_window_alone_and_hears_nothing_of_access_platform() {
    for offered in [GOOD.features, GOOD.features | ACCESS_PLATFORM] {
        let mut bench = windowed();
        let script = Script {
            features: offered,
            ..GOOD
        };
        let backend = Backend::listen(&bench.path, &[script]);
        bench.live();
        assert_eq!(
            bench.device.features() & !SIZE_MAX,
            VERSION_1 | FLUSH | ACCESS_PLATFORM
        );
        assert!(bench.device.accepts(VERSION_1 | ACCESS_PLATFORM));
        let last = WINDOW - 6 - 8 * 64;
        let features = bench.device.features();
        let rings = [0x1_0000, 0x2_0000, last / 4 * 4];
        bench.activate_at(features, rings).unwrap();
        until("started", || {
            backend.seen.payload(SET_VRING_ENABLE).is_some()
        });
        let payload = |code| backend.seen.payload(code).unwrap();
        let chosen = u64::from_le_bytes(payload(SET_FEATURES).try_into().unwrap());
        assert_eq!(
            chosen & (ACCESS_PLATFORM | VERSION_1 | FLUSH),
            VERSION_1 | FLUSH
        );
        let table = payload(SET_MEM_TABLE);
        let word = |at: usize| u64::from_le_bytes(table[at..at + 8].try_into().unwrap());
        assert_eq!(table.len(), 8 + 32, "one region");
        assert_eq!((word(0) as u32, word(8), word(16)), (1, 0, WINDOW));
        let file = backend.seen.file(SET_MEM_TABLE);
        assert_eq!(file.metadata().unwrap().len(), WINDOW);
        bench.reset();
    }
}

#[test]
fn a_driver_that_does_not_take_access_platform_is_refused_where_only_the_window_will_do() {
    let bench = reaching(Dma::Window);
    let _backend = Backend::listen(&bench.path, &[GOOD]);
    bench.live();
    assert_eq!(bench.device.features() & SIZE_MAX, 0);
    assert!(!bench.device.accepts(VERSION_1 | FLUSH));
    assert!(bench.device.accepts(VERSION_1 | FLUSH | ACCESS_PLATFORM));
}

#[test]
fn a_ring_that_is_not_all_in_the_window_never_reaches_the_backend() {
    let mut bench = reaching(Dma::Window);
    let backend = Backend::listen(&bench.path, &[GOOD]);
    bench.live();
    let features = bench.device.features();
    let inside = [0x1_0000, 0x2_0000, 0x3_0000];
    for outside in [ABOVE, ABOVE + 0x1000, WINDOW - 2, WINDOW, u64::MAX - 1] {
        for area in 0..3 {
            let mut rings = inside;
            rings[area] = outside;
            let line = bench.activate_at(features, rings).unwrap_err();
            assert!(line.contains(&format!("{outside:#x}")), "{line}");
            assert!(line.contains("iommu=usedac"), "{line}");
        }
    }
    // The next driver does better, and is the first that the backend hears of.
    bench.activate();
    until("started", || {
        backend.seen.payload(SET_VRING_ENABLE).is_some()
    });
    let requests = backend.seen.requests.lock().unwrap();
    let tables = requests.iter().filter(|(code, _)| *code == SET_MEM_TABLE);
    assert_eq!(tables.count(), 1);
    drop(requests);
    bench.reset();
}

/// Whatever a driver does, the backend has the window or bounce memory, and the next driver may do otherwise.
#[test]
fn a_driver_that_does_not_keep_to_the_window_has_shadow_queues() {
    let mut bench = windowed();
    let backend = Backend::listen(&bench.path, &[GOOD]);
    bench.live();
    let all = bench.device.features();
    assert_eq!(all & SIZE_MAX, SIZE_MAX);
    let (inside, outside) = ([0x1_0000, 0x2_0000, 0x3_0000], [ABOVE, 0x2_0000, 0x3_0000]);
    for (features, rings, memory) in [
        (all, inside, "berth-guest-ram"),
        (all & !ACCESS_PLATFORM, inside, "berth-bounce"),
        (all, inside, "berth-guest-ram"),
        (all, outside, "berth-bounce"),
        (all & !ACCESS_PLATFORM, outside, "berth-bounce"),
    ] {
        assert!(bench.device.accepts(features));
        let tables = || {
            let requests = backend.seen.requests.lock().unwrap();
            let enabled =
                |(code, value): &&(u32, Vec<u8>)| *code == SET_VRING_ENABLE && value[4] == 1;
            requests.iter().filter(enabled).count()
        };
        let before = tables();
        bench.activate_at(features, rings).unwrap();
        until("started", || tables() > before);
        let (len, name) = given(&backend);
        assert!(name.contains(memory), "{name}, not {memory}");
        assert_eq!(len == WINDOW, memory == "berth-guest-ram");
        bench.reset();
    }
}

#[test]
fn a_device_whose_backend_met_a_buffer_outside_has_shadow_queues_from_its_reset_on() {
    for (dma, then) in [
        (Dma::Auto, "berth-bounce"),
        (Dma::Window, "berth-guest-ram"),
    ] {
        let mut bench = reaching(dma);
        let backend = Backend::listen(&bench.path, &[GOOD]);
        bench.live();
        bench.activate();
        until("started", || {
            backend.seen.payload(SET_VRING_ENABLE).is_some()
        });
        assert!(given(&backend).1.contains("berth-guest-ram"));
        let mut err = backend.seen.file(SET_VRING_ERR);
        err.write_all(&1_u64.to_ne_bytes()).unwrap();
        wait(&bench.notes.reset, "needs_reset");
        bench.reset();
        backend.seen.requests.lock().unwrap().clear();
        bench.activate();
        until("started again", || {
            backend.seen.payload(SET_VRING_ENABLE).is_some()
        });
        assert!(given(&backend).1.contains(then), "{dma:?}");
        bench.reset();
    }
}

#[test]
fn memory_that_is_private_is_never_given_away() {
    let memory = MemoryConfig {
        shared: Some(false),
        ..MemoryConfig::of(2 << 20)
    };
    let ram = GuestRam::with_mode(&memory, Mode::Private).unwrap();
    let mut bench = bench_with(LIMIT, ram, |_| ());
    let backend = Backend::listen(&bench.path, &[GOOD]);
    bench.live();
    assert_eq!(bench.device.features(), VERSION_1 | FLUSH | SIZE_MAX);
    bench.activate();
    until("started", || {
        backend.seen.payload(SET_VRING_ENABLE).is_some()
    });
    let table = backend.seen.payload(SET_MEM_TABLE).unwrap();
    assert_eq!(table.len(), 8 + 32, "one region");
    assert!(given(&backend).1.contains("berth-bounce"));
    bench.reset();
}

/// A ring that makes no sense ends its worker, which has the driver start over.
#[test]
fn a_ring_that_makes_no_sense_needs_a_reset() {
    let memory = MemoryConfig::of(2 << 20);
    let ram = GuestRam::with_mode(&memory, Mode::Private).unwrap();
    let mut bench = bench_with(LIMIT, ram, |_| ());
    let _backend = Backend::listen(&bench.path, &[GOOD]);
    bench.live();
    for _ in 0..2 {
        bench
            .memory()
            .write_obj(0_u64, GuestAddress(0x2_0000))
            .unwrap();
        let [kick, _] = bench.activate();
        let index = GuestAddress(0x2_0002);
        bench.memory().write_obj(65_u16, index).unwrap();
        kick.write(1).unwrap();
        wait(&bench.notes.reset, "needs_reset");
        bench.reset();
    }
}

#[test]
fn without_a_window_nothing_is_offered_and_all_memory_is_mapped() {
    let mut bench = bench();
    let backend = Backend::listen(&bench.path, &[GOOD]);
    bench.live();
    assert_eq!(bench.device.features() & ACCESS_PLATFORM, 0);
    assert!(bench.device.accepts(VERSION_1));
    bench.activate();
    until("started", || {
        backend.seen.payload(SET_VRING_ENABLE).is_some()
    });
    bench.reset();
}
