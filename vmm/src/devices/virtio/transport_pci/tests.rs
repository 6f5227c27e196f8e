//! The transport as a driver sees it, through its BAR.

use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_F_VERSION_1,
};
use vm_memory::GuestAddress;

use super::notifier::NO_VECTOR;
use super::*;
use crate::devices::virtio::fake::{FEATURE, FakeDevice, QUEUES};
use crate::pci::fake::FakeWiring;

const FEATURES_OK: u8 = 8;
const DRIVER_OK: u8 = 4;
const NEEDS_RESET: u8 = 0x40;
const DRIVER: u8 = (VIRTIO_CONFIG_S_ACKNOWLEDGE | VIRTIO_CONFIG_S_DRIVER) as u8;
const MEMORY: usize = 1 << 20;

struct Bench {
    wiring: FakeWiring,
    device: FakeDevice,
    function: Arc<VirtioPci>,
}

fn bench() -> Bench {
    let wiring = FakeWiring::default();
    let device = FakeDevice::default();
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap();
    let function = VirtioPci::new("test", Box::new(device.clone()), &wiring, memory).unwrap();
    Bench {
        wiring,
        device,
        function,
    }
}

impl Bench {
    fn read<const N: usize>(&self, offset: u64) -> [u8; N] {
        let mut data = [0xee; N];
        self.function.read(offset, &mut data);
        data
    }

    fn read16(&self, offset: u64) -> u16 {
        u16::from_le_bytes(self.read(offset))
    }

    fn write16(&self, offset: u64, value: u16) {
        self.function.write(offset, &value.to_le_bytes());
    }

    fn write32(&self, offset: u64, value: u32) {
        self.function.write(offset, &value.to_le_bytes());
    }

    fn status(&self) -> u8 {
        self.read::<1>(0x14)[0]
    }

    fn set_status(&self, status: u8) {
        self.function.write(0x14, &[status]);
    }

    fn choose(&self, features: u64) {
        for (select, half) in [(0, features as u32), (1, (features >> 32) as u32)] {
            self.write32(0x08, select);
            self.write32(0x0c, half);
        }
    }

    /// As far as FEATURES_OK, as a driver goes.
    fn negotiate(&self) {
        self.set_status(DRIVER);
        self.choose(1 << VIRTIO_F_VERSION_1 | FEATURE);
        self.set_status(DRIVER | FEATURES_OK);
        assert_eq!(self.status(), DRIVER | FEATURES_OK);
    }

    /// A queue of 64 at this address, with this vector.
    fn enable(&self, queue: u16, at: u64, vector: u16) {
        self.write16(0x16, queue);
        self.write16(0x18, 64);
        self.write16(0x1a, vector);
        for (register, address) in [
            (0x20, at),
            (0x28, at.wrapping_add(0x1000)),
            (0x30, at.wrapping_add(0x2000)),
        ] {
            self.write32(register, address as u32);
            self.write32(register + 4, (address >> 32) as u32);
        }
        self.write16(0x1c, 1);
    }

    fn run(&self) {
        self.negotiate();
        self.enable(0, 0x4000, 1);
        self.set_status(DRIVER | FEATURES_OK | DRIVER_OK);
        assert_eq!(self.status(), DRIVER | FEATURES_OK | DRIVER_OK);
        assert!(self.device.state().activation.is_some());
    }

    /// MSI-X on, these vectors unmasked, each with its number as data.
    fn unmask(&self, vectors: &[u64]) {
        for vector in vectors {
            let entry = TABLE + 16 * vector;
            self.write32(entry, 0xfee0_0000);
            self.write32(entry + 8, *vector as u32);
            self.write32(entry + 12, 0);
        }
        self.function.set_msix(true, false);
    }

    fn raised(&self, vector: u16) -> bool {
        self.function.msix.event(vector).unwrap().read().is_ok()
    }
}

#[test]
fn features_are_offered_in_two_halves_and_nothing_above() {
    let bench = bench();
    let offered = [0, 1, 2, u32::MAX].map(|select| {
        bench.write32(0, select);
        u32::from_le_bytes(bench.read(4))
    });
    assert_eq!(offered, [FEATURE as u32, 1, 0, 0]);
}

#[test]
fn the_driver_path_of_the_specification_activates_the_device() {
    let bench = bench();
    bench.run();
    let state = bench.device.state();
    let activation = state.activation.as_ref().unwrap();
    assert_eq!(activation.features, 1 << VIRTIO_F_VERSION_1 | FEATURE);
    let [queue] = &activation.queues[..] else {
        panic!("{} queues", activation.queues.len());
    };
    assert_eq!((queue.index, queue.size), (0, 64));
    assert_eq!(
        (queue.desc, queue.avail, queue.used),
        (0x4000, 0x5000, 0x6000)
    );
}

#[test]
fn features_that_will_not_do_leave_features_ok_clear() {
    let version_1 = 1 << VIRTIO_F_VERSION_1;
    for (features, refuses) in [
        (0, false),
        (FEATURE, false),
        (version_1 | 1 << 50, false),
        (version_1, true),
    ] {
        let bench = bench();
        bench.device.state().refuses = refuses;
        bench.set_status(DRIVER);
        bench.choose(features);
        bench.set_status(DRIVER | FEATURES_OK);
        assert_eq!(bench.status(), DRIVER, "{features:#x}");
        // Without FEATURES_OK there is no DRIVER_OK.
        bench.set_status(DRIVER | FEATURES_OK | DRIVER_OK);
        assert_eq!(bench.status() & DRIVER_OK, 0);
        assert!(bench.device.state().activation.is_none());
    }
}

#[test]
fn features_stay_as_they_are_once_accepted() {
    let bench = bench();
    bench.negotiate();
    bench.choose(0);
    bench.write32(0x08, 1);
    assert_eq!(u32::from_le_bytes(bench.read(0x0c)), 1);
}

#[test]
fn a_queue_takes_what_the_specification_allows_and_is_fixed_when_enabled() {
    let bench = bench();
    assert_eq!(bench.read16(0x12), 2);
    bench.write16(0x16, 1);
    assert_eq!(bench.read16(0x18), QUEUES[1]);
    for size in [0, 3, 65, 128, 0x8000] {
        bench.write16(0x18, size);
        assert_eq!(bench.read16(0x18), 64, "{size}");
    }
    bench.write16(0x18, 32);
    assert_eq!((bench.read16(0x18), bench.read16(0x1e)), (32, 1));
    bench.function.write(0x20, &0x1_2345_6000_u64.to_le_bytes());
    assert_eq!(bench.read(0x20), 0x1_2345_6000_u64.to_le_bytes());
    bench.write16(0x1c, 1);
    bench.write16(0x18, 16);
    bench.write32(0x20, 0);
    bench.write16(0x1c, 0);
    assert_eq!((bench.read16(0x18), bench.read16(0x1c)), (32, 1));
    assert_eq!(bench.read(0x20), 0x1_2345_6000_u64.to_le_bytes());
}

#[test]
fn a_queue_that_does_not_exist_has_size_0_and_takes_nothing() {
    let bench = bench();
    for queue in [2, 0xffff] {
        bench.enable(queue, 0x4000, 0);
        assert_eq!(bench.read16(0x18), 0);
        assert_eq!(bench.read16(0x1c), 0);
    }
}

#[test]
fn a_vector_that_does_not_exist_reads_back_as_none() {
    let bench = bench();
    bench.write16(0x10, 2);
    assert_eq!(bench.read16(0x10), 2);
    bench.write16(0x10, 3);
    assert_eq!(bench.read16(0x10), NO_VECTOR);
    bench.write16(0x1a, 0x7fff);
    assert_eq!(bench.read16(0x1a), NO_VECTOR);
}

#[test]
fn a_ring_outside_memory_or_out_of_line_needs_a_reset() {
    for at in [MEMORY as u64 - 0x2000, u64::MAX - 0xfff, 0x4008, 1 << 60] {
        let bench = bench();
        bench.negotiate();
        bench.enable(0, at, 0);
        bench.set_status(DRIVER | FEATURES_OK | DRIVER_OK);
        assert_eq!(bench.status() & NEEDS_RESET, NEEDS_RESET, "{at:#x}");
        assert!(bench.device.state().activation.is_none());
        bench.set_status(0);
        assert_eq!(bench.status(), 0);
    }
}

#[test]
fn status_keeps_its_value_until_the_device_has_let_go() {
    let bench = bench();
    bench.run();
    bench.device.state().busy = true;
    bench.set_status(0);
    assert_eq!(bench.status(), DRIVER | FEATURES_OK | DRIVER_OK);
    // Nothing begins in the meantime.
    bench.set_status(DRIVER);
    bench.set_status(0);
    assert_eq!(bench.device.state().resets, 1);
    bench.device.state().busy = false;
    assert_eq!(bench.status(), 0);
    assert_eq!((bench.read16(0x1c), bench.read16(0x18)), (0, QUEUES[0]));
    bench.run();
}

#[test]
fn interrupts_of_a_queue_go_to_its_vector_also_when_it_changes() {
    let bench = bench();
    bench.unmask(&[1, 2]);
    bench.run();
    let activation = bench.device.state().activation.take().unwrap();
    activation.queues[0].call.write(1).unwrap();
    assert!(bench.raised(1) && !bench.raised(2));
    bench.write16(0x1a, 2);
    assert_eq!(bench.device.state().calls, [0]);
}

#[test]
fn a_change_of_configuration_bumps_the_generation_and_interrupts() {
    let bench = bench();
    bench.unmask(&[0]);
    bench.write16(0x10, 0);
    bench.run();
    let before = bench.read::<1>(0x15);
    let notify = bench.device.state().notify.clone().unwrap();
    notify.config_changed();
    assert_eq!(bench.read::<1>(0x15), [before[0].wrapping_add(1)]);
    assert!(bench.raised(0));
    assert_eq!(bench.read::<4>(ISR), [2, 0, 0, 0]);
    assert_eq!(bench.read::<1>(ISR), [0]);
    notify.needs_reset();
    notify.needs_reset();
    assert_eq!(bench.status() & NEEDS_RESET, NEEDS_RESET);
    assert!(bench.raised(0));
}

#[test]
fn device_configuration_is_the_devices() {
    let bench = bench();
    bench.function.write(DEVICE + 2, &[1, 2]);
    assert_eq!(bench.read(DEVICE), [0, 0, 1, 2, 0, 0, 0, 0]);
    assert_eq!(bench.read(DEVICE + DEVICE_LEN - 4), [0; 4]);
}

#[test]
fn doorbells_follow_the_bar() {
    let bench = bench();
    assert!(bench.wiring.doorbells().is_empty());
    let base = 0x4_0000_0000;
    bench.function.moved(Some(base));
    let expected = [(base + NOTIFY, 0), (base + NOTIFY + 4, 1)];
    assert_eq!(bench.wiring.doorbells(), expected);
    bench.function.moved(Some(base + 4));
    assert_eq!(bench.wiring.doorbells()[0], (base + 4 + NOTIFY, 0));
    bench.function.moved(None);
    assert!(bench.wiring.doorbells().is_empty());
}

#[test]
fn a_doorbell_rung_by_hand_kicks_its_queue_alone() {
    let bench = bench();
    bench.write16(NOTIFY + 4, 1);
    bench.write16(NOTIFY + 8, 2);
    bench.write16(BAR_SIZE - 2, 2);
    assert!(bench.function.doorbells[0].event().read().is_err());
    assert_eq!(bench.function.doorbells[1].event().read().unwrap(), 1);
}

#[test]
fn accesses_of_no_shape_that_the_specification_knows_harm_nothing() {
    let bench = bench();
    for offset in (0..BAR_SIZE).step_by(1021).chain(0..0x50) {
        for len in [1, 2, 4, 8] {
            let mut data = [0xff; 8];
            bench.function.write(offset, &data[..len]);
            bench.function.read(offset, &mut data[..len]);
        }
    }
    bench.set_status(0);
    assert_eq!(bench.status(), 0);
    bench.run();
}

#[test]
fn a_function_that_goes_takes_its_vectors_along_whoever_still_holds_them() {
    let bench = bench();
    bench.function.set_msix(true, false);
    bench.write32(TABLE, 0xfee0_1000);
    bench.write32(TABLE + 12, 0);
    assert_eq!(bench.wiring.message(0), Some((0xfee0_1000, 0)));
    // The device keeps its way back to the transport, as a thread of its own does.
    drop(bench.function);
    assert!(bench.device.state().notify.is_some());
    assert_eq!(bench.wiring.message(0), None);
}
