//! Devices that reach a part of guest memory only.

use super::*;
use crate::config::Mergeable;
use crate::memory::Mode;

const ACCESS_PLATFORM: u64 = 1 << 33;
const WINDOW: u64 = 2 << 20;
const ABOVE: u64 = 1 << 32;

fn windowed() -> Bench {
    let memory = MemoryConfig {
        mergeable: Mergeable::Eligible,
        ..MemoryConfig::of(6 << 20)
    };
    let ram = GuestRam::with_mode(&memory, Mode::Window { len: WINDOW }).unwrap();
    bench_with(LIMIT, ram, |_| ())
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
        assert_eq!(bench.device.features(), VERSION_1 | FLUSH | ACCESS_PLATFORM);
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
fn a_driver_that_does_not_take_access_platform_is_refused() {
    let bench = windowed();
    let _backend = Backend::listen(&bench.path, &[GOOD]);
    bench.live();
    assert!(!bench.device.accepts(VERSION_1 | FLUSH));
    assert!(bench.device.accepts(VERSION_1 | FLUSH | ACCESS_PLATFORM));
}

#[test]
fn a_ring_that_is_not_all_in_the_window_never_reaches_the_backend() {
    let mut bench = windowed();
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
