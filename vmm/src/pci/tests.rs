//! The topology as a guest sees it, through the buses.

use super::fake::FakeWiring;
use super::*;
use crate::devices::virtio::fake::FakeDevice;

const MMIO64: u64 = 16 << 30;
const NOTIFY: u64 = 0x1_0000;
const COMMAND: u64 = 0x04;
const BAR: u64 = 0x10;

struct Machine {
    wiring: FakeWiring,
    mmio: Arc<Bus>,
    ports: Arc<Bus>,
    pci: Pci,
}

/// A built-in device at 00:01.0, two below ports 00:02.0 and 00:03.0, and none below port 00:04.0.
fn machine() -> Machine {
    let wiring = FakeWiring::default();
    let (mmio, ports) = (Arc::new(Bus::new()), Arc::new(Bus::new()));
    let mut host = PciHost::new(PciContext {
        wiring: Arc::new(wiring.clone()),
        memory: GuestMemoryMmap::new(),
        mmio: Arc::clone(&mmio),
        ports: Arc::clone(&ports),
        mmio64_start: MMIO64,
    });
    let device = || Box::new(FakeDevice::default());
    host.add_builtin("_rng", device()).unwrap();
    host.add_below_root_port("_disk0", device(), 0x1b36)
        .unwrap();
    host.add_below_root_port("_disk1", device(), 0x1106)
        .unwrap();
    host.add_empty_root_port(0x1b36).unwrap();
    let pci = host.finish().unwrap();
    Machine {
        wiring,
        mmio,
        ports,
        pci,
    }
}

impl Machine {
    fn ecam(bus: u8, device: u8, register: u64) -> u64 {
        ECAM_START + (u64::from(bus) << 20) + (u64::from(device) << 15) + register
    }

    fn read<const N: usize>(&self, bus: u8, device: u8, register: u64) -> [u8; N] {
        let mut data = [0; N];
        assert!(self.mmio.read(Self::ecam(bus, device, register), &mut data));
        data
    }

    fn read16(&self, bus: u8, device: u8, register: u64) -> u16 {
        u16::from_le_bytes(self.read(bus, device, register))
    }

    fn read32(&self, bus: u8, device: u8, register: u64) -> u32 {
        u32::from_le_bytes(self.read(bus, device, register))
    }

    fn write(&self, bus: u8, device: u8, register: u64, data: &[u8]) {
        assert!(self.mmio.write(Self::ecam(bus, device, register), data));
    }

    fn write32(&self, bus: u8, device: u8, register: u64, value: u32) {
        self.write(bus, device, register, &value.to_le_bytes());
    }

    fn bar(&self, bus: u8, device: u8) -> u64 {
        let low = u64::from(self.read32(bus, device, BAR) & !0xf);
        low | u64::from(self.read32(bus, device, BAR + 4)) << 32
    }

    fn set_bar(&self, bus: u8, device: u8, base: u64) {
        self.write32(bus, device, BAR, base as u32);
        self.write32(bus, device, BAR + 4, (base >> 32) as u32);
    }

    /// Where the first doorbells of the devices are, as bases of their BARs.
    fn bells(&self) -> Vec<u64> {
        let bells = self.wiring.doorbells();
        let first = bells.iter().filter(|(_, number)| number % 2 == 0);
        first.map(|(at, _)| at - NOTIFY).collect()
    }

    /// Whether something answers at the start of a BAR.
    fn answers(&self, base: u64) -> bool {
        self.mmio.read(base, &mut [0; 4])
    }

    fn by_ports<const N: usize>(&self, address: u32, offset: u64) -> [u8; N] {
        let mut data = [0; N];
        self.ports.write(ADDRESS_PORT, &address.to_le_bytes());
        assert!(self.ports.read(DATA_PORT + offset, &mut data));
        data
    }
}

#[test]
fn everybody_is_where_the_picture_says() {
    let machine = machine();
    assert_eq!(machine.read32(0, 0, 0), 0x0008_1b36);
    assert_eq!(machine.read32(0, 1, 0), 0x1042_1af4);
    assert_eq!(machine.read32(0, 2, 0), 0x000c_1b36);
    assert_eq!(machine.read32(0, 3, 0), 0x000c_1106);
    assert_eq!(machine.read32(1, 0, 0), 0x1042_1af4);
    assert_eq!(machine.read32(2, 0, 0), 0x1042_1af4);
    assert_eq!(machine.read32(0, 4, 0), 0x000c_1b36);
    for (bus, device) in [(0, 5), (0, 31), (1, 1), (3, 0), (63, 31)] {
        assert_eq!(machine.read32(bus, device, 0), u32::MAX, "{bus}:{device}");
    }
    assert_eq!(machine.read32(0, 1, 0x1000), u32::MAX, "function 1");
    assert_eq!(machine.read32(0, 1, 0x100), 0, "no extended capability");
    let found: Vec<_> = machine.pci.devices();
    let found: Vec<_> = found
        .iter()
        .map(|d| (d.id.as_str(), d.bdf.as_str()))
        .collect();
    let expected = [
        ("_rng", "0000:00:01.0"),
        ("_disk0", "0000:01:00.0"),
        ("_disk1", "0000:02:00.0"),
    ];
    assert_eq!(found, expected);
}

#[test]
fn firmware_left_bars_and_windows_that_work() {
    let machine = machine();
    let bars = [(0, 1), (1, 0), (2, 0)].map(|(bus, device)| machine.bar(bus, device));
    assert_eq!(bars, [MMIO64, MMIO64 + 0x10_0000, MMIO64 + 0x20_0000]);
    assert_eq!(machine.bells(), bars);
    assert!(bars.iter().all(|&bar| machine.answers(bar)));
    assert_eq!(machine.read(0, 2, 0x18), [0, 1, 1, 0]);
    assert_eq!(machine.read32(0, 2, 0x24), 0x0011_0011);
    assert_eq!(machine.read32(0, 2, 0x28), 4);
    // There is no I/O window, and the 32-bit one is closed: base above limit.
    assert_eq!(machine.read16(0, 2, 0x1c), 0);
    assert_eq!(machine.read32(0, 2, 0x20), 0x0000_fff0);
}

#[test]
fn both_ways_to_configuration_space_agree_at_every_width_and_alignment() {
    let machine = machine();
    for (bus, device) in [(0_u8, 0_u8), (0, 1), (0, 2), (1, 0), (1, 1), (9, 0)] {
        for register in (0..0x100_u32).step_by(4) {
            let address = 1 << 31 | u32::from(bus) << 16 | u32::from(device) << 11 | register;
            let dword: [u8; 4] = machine.by_ports(address, 0);
            assert_eq!(dword, machine.read::<4>(bus, device, register.into()));
            for offset in 0..4 {
                let byte: [u8; 1] = machine.by_ports(address, offset);
                assert_eq!(byte[0], dword[offset as usize]);
            }
            let middle: [u8; 2] = machine.by_ports(address, 1);
            assert_eq!(middle, dword[1..3]);
            let at = u64::from(register) + 1;
            assert_eq!(machine.read::<2>(bus, device, at), dword[1..3]);
        }
    }
    assert_eq!(machine.by_ports(0, 0), [0xff; 4], "not enabled");
}

#[test]
fn the_reset_register_stays_free_and_the_address_register_takes_dwords_only() {
    let machine = machine();
    machine.by_ports::<4>(0x8000_0800, 0);
    assert!(!machine.ports.write(0xcf9, &[6]));
    assert!(machine.ports.write(ADDRESS_PORT, &[0x12]));
    let mut address = [0; 4];
    machine.ports.read(ADDRESS_PORT, &mut address);
    assert_eq!(u32::from_le_bytes(address), 0x8000_0800);
}

#[test]
fn writes_of_a_byte_at_odd_places_arrive() {
    let machine = machine();
    machine.write(0, 1, 0x3c, &[0x5a]);
    machine.write(0, 1, 0x0d, &[0xff]);
    assert_eq!(machine.read::<1>(0, 1, 0x3c), [0x5a]);
    let address = 1_u32 << 31 | 1 << 11 | 0x3c;
    machine.ports.write(ADDRESS_PORT, &address.to_le_bytes());
    machine.ports.write(DATA_PORT, &[0xa5]);
    assert_eq!(machine.read::<1>(0, 1, 0x3c), [0xa5]);
}

#[test]
fn sizing_a_bar_finds_a_64_bit_prefetchable_one() {
    let machine = machine();
    machine.write(1, 0, COMMAND, &[0, 0]);
    machine.set_bar(1, 0, u64::MAX);
    let low = machine.read32(1, 0, BAR);
    assert_eq!(low & 0xf, 0xc);
    let mask = u64::from(low & !0xf) | u64::from(machine.read32(1, 0, BAR + 4)) << 32;
    assert_eq!(!mask + 1, 0x2_0000);
    for bar in 2..6 {
        machine.write32(1, 0, BAR + 4 * bar, u32::MAX);
        assert_eq!(machine.read32(1, 0, BAR + 4 * bar), 0);
    }
}

#[test]
fn a_bar_that_moves_takes_its_range_and_its_doorbells_along() {
    let machine = machine();
    let old = machine.bar(1, 0);
    let new = old + 0x4_0000;
    machine.set_bar(1, 0, new);
    assert!(!machine.answers(old) && machine.answers(new));
    assert_eq!(machine.bells()[1], new);
}

#[test]
fn a_bar_that_is_disabled_is_nowhere_until_it_is_enabled() {
    let machine = machine();
    let bar = machine.bar(0, 1);
    machine.write(0, 1, COMMAND, &[4, 0]);
    assert!(!machine.answers(bar));
    assert!(!machine.bells().contains(&bar));
    machine.write(0, 1, COMMAND, &[6, 0]);
    assert!(machine.answers(bar));
    assert!(machine.bells().contains(&bar));
}

#[test]
fn a_bridge_that_forwards_nothing_hides_the_bar_below() {
    let machine = machine();
    let bar = machine.bar(1, 0);
    // Decode off in the bridge.
    machine.write(0, 2, COMMAND, &[4, 0]);
    assert!(!machine.answers(bar) && machine.bells().len() == 2);
    machine.write(0, 2, COMMAND, &[6, 0]);
    assert!(machine.answers(bar) && machine.bells().len() == 3);
    // The window somewhere else.
    machine.write32(0, 2, 0x24, 0x0301_0301);
    assert!(!machine.answers(bar) && machine.bells().len() == 2);
    // The device follows it.
    machine.set_bar(1, 0, MMIO64 + 0x300_0000);
    assert!(!machine.answers(bar) && machine.answers(MMIO64 + 0x300_0000));
    // A window that ends in the middle of the BAR.
    machine.write32(0, 2, 0x24, 0x0301_0301);
    machine.set_bar(1, 0, MMIO64 + 0x30f_0000 + 0x1_0000);
    assert_eq!(machine.bells().len(), 2);
}

#[test]
fn a_32_bit_window_forwards_too() {
    let machine = machine();
    machine.set_bar(1, 0, MMIO32_START + 0x10_0000);
    assert_eq!(machine.bells().len(), 2);
    machine.write32(0, 2, 0x20, 0xc010_c010);
    assert!(machine.answers(MMIO32_START + 0x10_0000));
    assert_eq!(machine.bells()[0], MMIO32_START + 0x10_0000);
}

#[test]
fn a_bar_outside_the_host_windows_is_nowhere() {
    let machine = machine();
    for base in [0x10_0000, ECAM_START, 0xfee0_0000, 1 << 32, !0x1_ffff] {
        machine.set_bar(0, 1, base);
        assert_eq!(machine.bells().len(), 2, "{base:#x}");
    }
}

#[test]
fn bars_that_change_places_do_not_meet_and_one_on_another_waits() {
    let machine = machine();
    let (first, second) = (machine.bar(0, 1), MMIO64 + 0x4_0000);
    machine.write(1, 0, COMMAND, &[0, 0]);
    machine.write32(0, 2, 0x24, 0x0001_0001);
    machine.set_bar(1, 0, first);
    machine.write(1, 0, COMMAND, &[6, 0]);
    // Two on one place: the one that was there stays.
    assert_eq!(machine.bells(), [first, MMIO64 + 0x20_0000]);
    machine.set_bar(0, 1, second);
    assert_eq!(machine.bells(), [first, second, MMIO64 + 0x20_0000]);
}

#[test]
fn new_bus_numbers_lead_to_the_device() {
    let machine = machine();
    machine.write(0, 2, 0x18, &[0, 7, 9]);
    assert_eq!(machine.read32(7, 0, 0), 0x1042_1af4);
    assert_eq!(machine.read32(1, 0, 0), u32::MAX);
    assert_eq!(machine.pci.devices()[1].bdf, "0000:07:00.0");
    machine.write(0, 2, 0x18, &[0, 0, 0]);
    assert_eq!(machine.read32(7, 0, 0), u32::MAX);
}

#[test]
fn a_reset_of_the_secondary_bus_resets_the_device_alone() {
    let machine = machine();
    machine.write(0, 2, 0x3e, &[0x40, 0]);
    machine.write(0, 2, 0x3e, &[0, 0]);
    assert_eq!((machine.bar(1, 0), machine.read16(1, 0, COMMAND)), (0, 0));
    assert_eq!(machine.bells().len(), 2);
    assert_eq!(machine.read(0, 2, 0x18), [0, 1, 1, 0]);
}

#[test]
fn capability_lists_end_and_hold_what_drivers_look_for() {
    let machine = machine();
    for (bus, device, expected) in [
        (0, 1, [0x10, 9, 9, 9, 9, 9, 0x11].as_slice()),
        (0, 2, &[0x10, 0x05]),
        (1, 0, &[0x10, 9, 9, 9, 9, 9, 0x11]),
    ] {
        let mut ids = Vec::new();
        let mut at = machine.read::<1>(bus, device, 0x34)[0];
        while at != 0 && ids.len() < 20 {
            let [id, next] = machine.read(bus, device, at.into());
            ids.push(id);
            at = next;
        }
        assert_eq!(ids, expected, "{bus}:{device}");
    }
    assert_eq!(machine.read16(1, 0, 0x42) >> 4 & 0xf, 0, "endpoint");
    assert_eq!(machine.read16(0, 1, 0x42) >> 4 & 0xf, 9, "integrated");
    assert_eq!(machine.read16(0, 2, 0x42), 0x142, "root port with a slot");
}

#[test]
fn more_devices_than_bus_0_holds_are_refused() {
    let mut host = PciHost::new(PciContext {
        wiring: Arc::new(FakeWiring::default()),
        memory: GuestMemoryMmap::new(),
        mmio: Arc::default(),
        ports: Arc::default(),
        mmio64_start: MMIO64,
    });
    for i in 0..MAX_DEVICES - 1 {
        let device = Box::new(FakeDevice::default());
        host.add_below_root_port(&format!("_disk{i}"), device, 0x1b36)
            .unwrap();
    }
    let error = host
        .add_builtin("_rng", Box::new(FakeDevice::default()))
        .unwrap_err();
    assert_eq!(error.to_string(), "cannot add _rng: bus 0 holds 31 devices");
}
