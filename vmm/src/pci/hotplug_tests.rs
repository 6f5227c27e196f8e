//! Devices that come and go below a root port, as a guest sees them.

use super::fake::FakeWiring;
use super::*;
use crate::devices::virtio::fake::FakeDevice;

const MMIO64: u64 = 16 << 30;
/// Registers of the port: the PCI Express capability is the first.
const EXPRESS: u64 = 0x40;
const CONTROL: u64 = EXPRESS + 0x18;
const STATUS: u64 = EXPRESS + 0x1a;
const POWER_OFF: u16 = 1 << 10;
/// Button, command completed, interrupts, link.
const LISTEN: u16 = 1 | 1 << 4 | 1 << 5 | 1 << 12;
const PRESENT: u16 = 1 << 6;
/// The MSI capability follows.
const MSI: u64 = 0x7c;

struct Machine {
    wiring: FakeWiring,
    mmio: Arc<Bus>,
    pci: Pci,
    gone: Arc<Mutex<Vec<String>>>,
}

/// A device below port 00:01.0, bus 1, and nothing below port 00:02.0, bus 2.
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
    host.add_below_root_port("_disk0", Box::new(FakeDevice::default()), 0x1b36)
        .unwrap();
    host.add_empty_root_port(0x1b36).unwrap();
    let gone = Arc::new(Mutex::new(Vec::new()));
    let names = Arc::clone(&gone);
    host.on_ejection(move |name| names.lock().unwrap().push(name.to_owned()));
    Machine {
        wiring,
        mmio,
        pci: host.finish().unwrap(),
        gone,
    }
}

impl Machine {
    fn at(bus: u64, device: u64, register: u64) -> u64 {
        ECAM_START + (bus << 20) + (device << 15) + register
    }

    fn read(&self, bus: u64, device: u64, register: u64) -> u32 {
        let mut data = [0; 4];
        self.mmio.read(Self::at(bus, device, register), &mut data);
        u32::from_le_bytes(data)
    }

    fn write16(&self, bus: u64, device: u64, register: u64, value: u16) {
        self.mmio
            .write(Self::at(bus, device, register), &value.to_le_bytes());
    }

    fn write32(&self, bus: u64, device: u64, register: u64, value: u32) {
        self.mmio
            .write(Self::at(bus, device, register), &value.to_le_bytes());
    }

    fn status(&self, port: u64) -> u16 {
        self.read(0, port, STATUS) as u16
    }

    fn plug(&self, name: &str) -> Result<String, String> {
        let device = Box::new(FakeDevice::default());
        let plugged = self.pci.plug(name, device);
        plugged.map(|info| info.bdf).map_err(|e| e.to_string())
    }

    fn names(&self) -> Vec<String> {
        self.pci.devices().into_iter().map(|d| d.id).collect()
    }

    /// The BAR of the device below bus 2, in the window that firmware left the port, and decode on.
    fn configure(&self) -> u64 {
        let bar = MMIO64 + 0x10_0000;
        self.write32(2, 0, 0x10, bar as u32);
        self.write32(2, 0, 0x14, (bar >> 32) as u32);
        self.write16(2, 0, 0x04, 6);
        bar
    }

    fn has_bell_at(&self, bar: u64) -> bool {
        let bells = self.wiring.doorbells();
        bells.iter().any(|&(at, _)| at == bar + 0x1_0000)
    }
}

#[test]
fn a_device_is_added_used_removed_and_another_added_in_its_place() {
    let machine = machine();
    machine.write16(0, 2, CONTROL, LISTEN | POWER_OFF);
    for round in 0..3 {
        machine.write16(0, 2, STATUS, u16::MAX);
        let name = format!("_disk{}", round + 1);
        assert_eq!(machine.plug(&name).unwrap(), "0000:02:00.0");
        assert_eq!(
            machine.status(2),
            PRESENT | 1 << 3 | 1,
            "presence and button"
        );
        assert_eq!(machine.read(2, 0, 0), u32::MAX, "no power");
        machine.write16(0, 2, CONTROL, LISTEN);
        assert_eq!(machine.read(2, 0, 0), 0x1042_1af4);
        let bar = machine.configure();
        assert!(machine.mmio.read(bar, &mut [0; 4]) && machine.has_bell_at(bar));
        assert_eq!(machine.names(), ["_disk0", &name]);

        assert!(machine.pci.request_removal(&name));
        assert!(
            machine.has_bell_at(bar),
            "it works on until the guest lets go"
        );
        assert!(machine.gone.lock().unwrap().is_empty());
        machine.write16(0, 2, CONTROL, LISTEN | POWER_OFF);
        assert_eq!(std::mem::take(&mut *machine.gone.lock().unwrap()), [name]);
        assert!(!machine.mmio.read(bar, &mut [0; 4]) && !machine.has_bell_at(bar));
        assert_eq!(machine.read(2, 0, 0), u32::MAX);
        assert_eq!(machine.names(), ["_disk0"]);
    }
}

#[test]
fn a_device_that_was_there_at_boot_goes_too_and_its_port_is_free() {
    let machine = machine();
    let bar = MMIO64;
    assert!(machine.has_bell_at(bar));
    assert!(machine.pci.request_removal("_disk0"));
    machine.write16(0, 1, CONTROL, POWER_OFF);
    assert!(!machine.has_bell_at(bar));
    assert_eq!(machine.plug("_disk1").unwrap(), "0000:02:00.0");
    assert_eq!(machine.plug("_disk2").unwrap(), "0000:01:00.0");
    assert_eq!(machine.pci.free_ports(), 0);
    let full = machine.plug("_disk3").unwrap_err();
    assert!(
        full.contains("_disk3") && full.contains("hotplug_ports"),
        "{full}"
    );
    assert!(!machine.pci.request_removal("_disk3"));
}

#[test]
fn the_port_that_was_used_least_takes_the_next_device() {
    let mut host = PciHost::new(PciContext {
        wiring: Arc::new(FakeWiring::default()),
        memory: GuestMemoryMmap::new(),
        mmio: Arc::default(),
        ports: Arc::default(),
        mmio64_start: MMIO64,
    });
    for _ in 0..3 {
        host.add_empty_root_port(0x1b36).unwrap();
    }
    let pci = host.finish().unwrap();
    let buses = (0..6).map(|round| {
        let name = format!("_disk{round}");
        let device = Box::new(FakeDevice::default());
        let bdf = pci.plug(&name, device).unwrap().bdf;
        // It has no power, and goes at once.
        assert!(pci.request_removal(&name));
        bdf[5..7].to_owned()
    });
    let buses: Vec<_> = buses.collect();
    assert_eq!(buses, ["01", "02", "03", "01", "02", "03"]);
}

#[test]
fn a_device_whose_power_is_off_is_not_there_and_comes_back_as_after_a_reset() {
    let machine = machine();
    machine.plug("_disk1").unwrap();
    machine.write16(0, 2, CONTROL, 0);
    let bar = machine.configure();
    machine.write16(0, 2, CONTROL, POWER_OFF);
    assert!(!machine.has_bell_at(bar));
    assert!(machine.gone.lock().unwrap().is_empty());
    machine.write16(0, 2, CONTROL, 0);
    assert_eq!(machine.read(2, 0, 0x10), 0xc, "the BAR is not set up");
    let bar = machine.configure();
    assert!(machine.has_bell_at(bar));
    // Off once more, nobody has to be asked.
    machine.write16(0, 2, CONTROL, POWER_OFF);
    assert!(machine.pci.request_removal("_disk1"));
    assert_eq!(*machine.gone.lock().unwrap(), ["_disk1"]);
}

#[test]
fn the_slots_interrupt_is_the_ports_msi() {
    let machine = machine();
    assert_eq!(machine.read(0, 2, MSI) & 0xff, 5, "an MSI capability");
    // Vectors: three of the first device, one of each port.
    let vector = 4;
    machine.write32(0, 2, MSI + 4, 0xfee0_1000);
    machine.write32(0, 2, MSI + 8, 0);
    machine.write16(0, 2, MSI + 12, 0x41);
    assert_eq!(machine.wiring.message(vector), None);
    machine.write16(0, 2, MSI + 2, 1);
    assert_eq!(machine.wiring.message(vector), Some((0xfee0_1000, 0x41)));
    assert_eq!(machine.wiring.raised(vector), 0);
    machine.write16(0, 2, CONTROL, LISTEN | POWER_OFF);
    assert_eq!(machine.wiring.raised(vector), 1, "the command is completed");
    machine.write16(0, 2, STATUS, u16::MAX);
    machine.plug("_disk1").unwrap();
    assert_eq!(machine.wiring.raised(vector), 1);
    machine.write16(0, 2, MSI + 2, 0);
    assert_eq!(machine.wiring.message(vector), None);
}
