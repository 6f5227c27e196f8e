//! A guest that writes anything anywhere, and what must hold after each of its writes.

use std::collections::BTreeMap;

use super::fake::FakeWiring;
use super::*;
use crate::devices::virtio::fake::{FakeDevice, QUEUES};
use crate::memory::layout::MMIO64_LEN;

const MMIO64: u64 = 16 << 30;
const NOTIFY: u64 = 0x1_0000;
const BAR_LEN: u64 = 0x2_0000;
/// Writes of a run; each run has another seed.
const WRITES: usize = 20_000;

/// xorshift64*: the same numbers in each run of the tests.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }
}

struct Machine {
    wiring: FakeWiring,
    mmio: Arc<Bus>,
    tree: Arc<Mutex<Tree>>,
}

fn machine() -> Machine {
    let wiring = FakeWiring::default();
    let mmio = Arc::new(Bus::new());
    let mut host = PciHost::new(PciContext {
        wiring: Arc::new(wiring.clone()),
        memory: GuestMemoryMmap::new(),
        mmio: Arc::clone(&mmio),
        ports: Arc::default(),
        mmio64_start: MMIO64,
    });
    let device = || Box::new(FakeDevice::default());
    host.add_builtin("_rng", device()).unwrap();
    for name in ["_disk0", "_disk1", "_net0"] {
        host.add_below_root_port(name, device(), 0x1b36).unwrap();
    }
    Machine {
        wiring,
        mmio,
        tree: host.finish().unwrap().tree,
    }
}

impl Machine {
    /// A write that is likely to matter: headers mostly, values that are addresses in the windows.
    fn write(&self, random: &mut Random) {
        let bus = random.pick(&[0, 0, 0, 1, 2, 3, 7]);
        let device = random.pick(&[0, 0, 1, 2, 3, 4, 5]);
        let register = match random.below(8) {
            0 => random.below(0x1000),
            1 => 0x40 + random.below(0xc0),
            _ => random.pick(&[0x04, 0x04, 0x10, 0x14, 0x18, 0x20, 0x24, 0x28, 0x2c, 0x3e]),
        };
        let value = match random.below(5) {
            0 => random.next(),
            1 => u64::MAX,
            2 => random.pick(&[0x6, 0x4, 0x0, 0x0007_0700, 0x0001_0100, 0x0303_0300]),
            3 => random.pick(&[0x4, 0x0010_0010, 0x0021_0011, 0xc010_c010]),
            _ => random.pick(&[0, MMIO32_START, MMIO64]) + random.below(64) * BAR_LEN,
        };
        let len = random.pick(&[1, 2, 4, 4, 4, 8]);
        let at = ECAM_START + (bus << 20) + (device << 15) + register;
        self.mmio.write(at, &value.to_le_bytes()[..len]);
    }

    /// An access into some BAR, wherever it is.
    fn access(&self, random: &mut Random) {
        let mapped: Vec<u64> = lock(&self.tree)
            .endpoints()
            .filter_map(|(_, endpoint)| endpoint.mapped)
            .collect();
        if mapped.is_empty() {
            return;
        }
        let at = random.pick(&mapped) + random.below(BAR_LEN);
        let mut data = random.next().to_le_bytes();
        let len = random.pick(&[1, 2, 4, 8]);
        self.mmio.write(at, &data[..len]);
        self.mmio.read(at, &mut data[..len]);
    }

    /// BARs lie in the host's windows, apart from each other, and the doorbells are in them.
    fn check(&self) {
        let windows = [
            MMIO32_START..MMIO32_START + MMIO32_LEN,
            MMIO64..MMIO64 + MMIO64_LEN,
        ];
        let mut doorbells = BTreeMap::new();
        let mut before: Option<u64> = None;
        let mut bases: Vec<(u64, usize)> = lock(&self.tree)
            .endpoints()
            .enumerate()
            .filter_map(|(i, (_, endpoint))| Some((endpoint.mapped?, i)))
            .collect();
        bases.sort_unstable();
        for (base, device) in bases {
            let last = base + BAR_LEN - 1;
            assert!(
                windows
                    .iter()
                    .any(|w| w.contains(&base) && w.contains(&last))
            );
            assert!(
                before.is_none_or(|before| before + BAR_LEN <= base),
                "{base:#x}"
            );
            assert!(self.mmio.read(base, &mut [0; 4]));
            for queue in 0..QUEUES.len() {
                let at = base + NOTIFY + 4 * queue as u64;
                doorbells.insert(at, device * QUEUES.len() + queue);
            }
            before = Some(base);
        }
        let expected: Vec<_> = doorbells.into_iter().collect();
        assert_eq!(self.wiring.doorbells(), expected);
    }
}

#[test]
fn doorbells_are_where_bars_are_whatever_a_guest_writes() {
    let mut placed = 0;
    for seed in 1..=5 {
        let mut random = Random(seed);
        let machine = machine();
        for _ in 0..WRITES {
            machine.write(&mut random);
            if random.below(4) == 0 {
                machine.access(&mut random);
            }
            if random.below(8) == 0 {
                machine.check();
                placed += machine.wiring.doorbells().len();
            }
        }
    }
    // The writes are not so wild that nothing ever is in place.
    assert!(placed > 1000, "{placed}");
}
