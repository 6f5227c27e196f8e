//! Puts a machine together: short named steps, in boot order.
//!
//! Runs on the thread `boot`. What can fail for the operator's reasons (files, memory, KVM) comes before
//! what has to be waited for (backends).

#![forbid(unsafe_code)]

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use berth_irqchip::{Chip, IOAPIC_LEN, Mode, Trigger};
use kvm_bindings::{KVM_CAP_HALT_POLL, kvm_enable_cap};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use vm_memory::GuestAddress;

use super::devices;
use super::events::{GuestEvent, GuestEvents};
pub use super::machine::Machine;
use super::machine::{Backends, ClearedBuses};
use crate::boot::acpi::{self, AcpiInput};
use crate::boot::{self, Entry};
use crate::config::validate::MAX_EXTERNAL_DEVICES;
use crate::config::{BalloonConfig, MemoryConfig, PlatformConfig, SerialConfig, VmConfig};
use crate::cpu::{self, Buses, Vcpus, cpuid, hypervisor, msr, regs};
use crate::devices::ioapic::IoapicPage;
use crate::devices::pm_timer::{PM_TIMER_LEN, PmTimer};
use crate::devices::power::{
    self, I8042_COMMAND_PORT, KeyboardController, PM_BLOCK_LEN, PowerBlock, ResetRegister,
};
use crate::devices::rtc::{self, Rtc};
use crate::devices::serial::output::Output;
use crate::devices::serial::port::{Input, RaiseInterrupt, SerialPort};
use crate::devices::serial::{PIN, PORT, PORT_LEN};
use crate::devices::test_device;
use crate::devices::virtio::{balloon, rng};
use crate::launcher::Launcher;
use crate::memory::layout::{
    IOAPIC_START, KVM_IDENTITY_MAP, KVM_TSS, PM_TIMER_PORT, PM1A_EVT_PORT, RESET_PORT, SCI_PIN,
    mmio64_start,
};
use crate::memory::{self, GuestRam};
use crate::pci::{self, PciContext, PciHost};
use crate::telemetry::startup::mark;
use crate::tuning::Tuning;
use crate::vhost_user::{self, Frontends, Kind};
use crate::{bus, kvm, sandbox};

/// How often a wait for backends looks whether it is still wanted.
const CANCEL_POLL: Duration = Duration::from_millis(100);

/// Why there is no machine.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// /dev/kvm.
    #[error(transparent)]
    Kvm(#[from] kvm::Error),
    /// KVM did not make what it should.
    #[error("KVM refused to {what}")]
    Refused {
        /// What.
        what: &'static str,
        /// KVM's answer.
        source: kvm_ioctls::Error,
    },
    /// Guest RAM.
    #[error(transparent)]
    Memory(#[from] memory::Error),
    /// How guest RAM is to be made.
    #[error(transparent)]
    MemoryMode(#[from] memory::ModeError),
    /// Interrupts.
    #[error(transparent)]
    Irqchip(#[from] berth_irqchip::Error),
    /// Two devices at one address; the layout is wrong.
    #[error(transparent)]
    Bus(#[from] bus::Error),
    /// Kernel, initramfs, command line.
    #[error(transparent)]
    Boot(#[from] boot::Error),
    /// ACPI tables.
    #[error(transparent)]
    Acpi(#[from] acpi::Error),
    /// CPUID.
    #[error(transparent)]
    Cpuid(#[from] cpuid::Error),
    /// MSRs.
    #[error(transparent)]
    Msr(#[from] msr::Error),
    /// Registers.
    #[error(transparent)]
    Regs(#[from] regs::Error),
    /// vCPU threads.
    #[error(transparent)]
    Vcpus(#[from] cpu::Error),
    /// PCI.
    #[error(transparent)]
    Pci(#[from] pci::Error),
    /// A disk or a network card.
    #[error(transparent)]
    Device(#[from] vhost_user::Error),
    /// The threads of disks and network cards.
    #[error("cannot start the vhost-user frontend")]
    Frontends(#[source] io::Error),
    /// The thread that puts the machine together.
    #[error("cannot start the boot thread")]
    Thread(#[source] io::Error),
    /// Nobody waits for the machine any more.
    #[error("the boot was given up")]
    Cancelled,
    /// Entropy.
    #[error(transparent)]
    Rng(#[from] rng::Error),
    /// Balloon.
    #[error(transparent)]
    Balloon(#[from] balloon::Error),
    /// The boot thread's own confinement.
    #[error(transparent)]
    Sandbox(#[from] sandbox::Error),
}

fn refused(what: &'static str) -> impl Fn(kvm_ioctls::Error) -> Error {
    move |source| Error::Refused { what, source }
}

/// KVM's side of a machine that has nothing yet.
pub struct NewVm {
    kvm: Kvm,
    vm: Arc<VmFd>,
}

impl NewVm {
    /// Makes it. To be called by the main thread: KVM's folder for it in debugfs bears the id of the thread
    /// that made it, and tools look for the process's.
    pub fn create(platform: &PlatformConfig) -> Result<Self, Error> {
        let kvm = kvm::open(Some(platform.irqchip))?;
        let vm = kvm.create_vm().map_err(refused("create a VM"))?;
        vm.set_identity_map_address(KVM_IDENTITY_MAP)
            .map_err(refused("place its identity map"))?;
        vm.set_tss_address(KVM_TSS as usize)
            .map_err(refused("place its TSS"))?;
        if let Some(ns) = platform.halt_poll_ns {
            set_halt_poll(&vm, ns)?;
        }
        Ok(Self {
            kvm,
            vm: Arc::new(vm),
        })
    }
}

/// What a machine is made from.
pub struct Parts {
    /// KVM's side of it.
    pub new_vm: NewVm,
    /// The configuration, validated.
    pub config: Arc<VmConfig>,
    /// The queues behind the serial port; none, no port.
    pub serial: Option<(Output, Arc<Input>)>,
    /// Where the guest's events go.
    pub events: GuestEvents,
    /// Starts daemons for disks and network cards.
    pub launcher: Option<Launcher>,
    /// Set when nobody waits for this machine any more.
    pub cancel: Arc<AtomicBool>,
}

/// Builds the machine; its vCPUs wait for [`Machine::resume`].
pub fn build(parts: &Parts) -> Result<Machine, Error> {
    let config = &*parts.config;
    sandbox::confine_boot(config)?;
    mark("boot thread, its files confined");
    let vm = &parts.new_vm.vm;
    let mode = memory::Mode::of(config)?;
    let ram = GuestRam::with_mode(&memory_of(config), mode)?;
    let slots = ram.register(vm)?;
    let domain = config.platform.trust_domain.clone();
    let tuning = Arc::new(Tuning::new(&ram, domain, config.memory.mergeable));
    mark("guest memory");
    let chip = create_chip(vm, config)?;
    mark("interrupt controllers");

    let mut buses = Buses::default();
    add_ioapic(&mut buses, &chip)?;
    let sci = Arc::new(chip.line(SCI_PIN, Trigger::Level)?);
    let power = add_power(&buses, &sci, &parts.events)?;
    add_clock(&buses, &ram)?;
    let serial = add_serial(&buses, &chip, parts)?;
    if config.platform.test_device {
        add_test_device(&buses, &chip, &ram, &parts.events)?;
    }
    // Backends are dialled from here on, while the kernel is loaded.
    let mut frontends = Frontends::new().map_err(Error::Frontends)?;
    frontends = frontends
        .starting(parts.launcher.clone())
        .reaching(&ram)
        .discarding(config.balloon.is_some());
    let mut host = pci_host(&buses, &chip, &ram, &parts.events);
    let balloon = add_devices(&mut host, config, &ram, &mut frontends)?;
    let pci = host.finish()?;

    mark("devices");
    let rsdp = write_acpi(&ram, config)?;
    mark("ACPI tables");
    let entry = boot::load(&ram, &config.payload, rsdp)?;
    mark("kernel loaded");
    if matches!(entry, Entry::Multiboot { .. }) && chip.mode() == Mode::Kernel {
        // What such an image is made for has firmware, which leaves these behind.
        chip.initialise_pics()?;
    }
    let fds = create_vcpus(&parts.new_vm, &chip, config, &ram, &entry)?;
    mark("vCPUs");
    wait_for_backends(&frontends, &parts.cancel)?;
    frontends.guest_runs();
    mark("backends");
    let vcpus = Vcpus::start(fds, &buses, &parts.events, &config.affinity)?;
    Ok(Machine {
        vcpus,
        frontends: Backends(frontends),
        _buses: ClearedBuses(buses),
        serial,
        power,
        sci,
        pci,
        balloon,
        chip,
        _slots: slots,
        ram,
        tuning,
    })
}

/// KVM_CAP_HALT_POLL: the most that KVM polls for a halted vCPU of this VM.
/// A guest without x2APIC has no use for long ids, and may give two vCPUs one id.
fn create_chip(vm: &Arc<VmFd>, config: &VmConfig) -> Result<Arc<Chip>, berth_irqchip::Error> {
    let mode = config.platform.irqchip;
    if config.cpus.features.removes_x2apic() {
        Chip::with_short_ids(Arc::clone(vm), mode)
    } else {
        Chip::new(Arc::clone(vm), mode)
    }
}

fn set_halt_poll(vm: &VmFd, ns: u32) -> Result<(), Error> {
    let cap = kvm_enable_cap {
        cap: KVM_CAP_HALT_POLL,
        args: [ns.into(), 0, 0, 0],
        ..Default::default()
    };
    vm.enable_cap(&cap).map_err(refused("take halt_poll_ns"))
}

/// The IOAPIC's page, and its interrupts' ends, where KVM leaves them to us.
fn add_ioapic(buses: &mut Buses, chip: &Arc<Chip>) -> Result<(), Error> {
    if chip.mode() == Mode::Split {
        let page = Arc::new(IoapicPage::new(Arc::clone(chip)));
        buses.mmio.insert(IOAPIC_START, IOAPIC_LEN, page)?;
        buses.irqchip = Some(Arc::clone(chip));
    }
    Ok(())
}

fn write_acpi(ram: &GuestRam, config: &VmConfig) -> Result<GuestAddress, Error> {
    let input = AcpiInput {
        vcpus: config.cpus.boot,
        serial: config.serial != SerialConfig::Off,
        pic: config.platform.irqchip == Mode::Kernel,
    };
    Ok(acpi::build(ram, &input)?)
}

fn create_vcpus(
    NewVm { kvm, vm }: &NewVm,
    chip: &Chip,
    config: &VmConfig,
    ram: &GuestRam,
    entry: &Entry,
) -> Result<Vec<VcpuFd>, Error> {
    kvm::check_vcpus(vm, config.cpus.boot, chip.has_extended_destinations())?;
    let mut fds = Vec::new();
    for id in 0..config.cpus.boot {
        let fd = vm
            .create_vcpu(id.into())
            .map_err(refused("create a vCPU"))?;
        let cpuid = cpuid::for_vcpu(kvm, &config.cpus, id)?;
        let facts = hypervisor::Facts {
            // Refused where the host's own TSC cannot be relied on: then the guest measures.
            tsc_khz: fd.get_tsc_khz().ok(),
            extended_destinations: chip.has_extended_destinations(),
        };
        let cpuid = hypervisor::complete(&cpuid, facts)?;
        fd.set_cpuid2(&cpuid)
            .map_err(refused("take a vCPU's CPUID"))?;
        msr::boot(&fd)?;
        fds.push(fd);
    }
    regs::setup(&fds[0], ram, entry)?;
    Ok(fds)
}

fn add_power(
    buses: &Buses,
    sci: &Arc<berth_irqchip::Line>,
    events: &GuestEvents,
) -> Result<Arc<PowerBlock>, Error> {
    let line = Arc::clone(sci);
    let raise: power::RaiseSci = Box::new(move || line.raise());
    let block = Arc::new(PowerBlock::new(raise, events.clone()));
    let pio = &buses.pio;
    pio.insert(PM1A_EVT_PORT.into(), PM_BLOCK_LEN, Arc::clone(&block) as _)?;
    let timer = Arc::new(PmTimer::new());
    pio.insert(PM_TIMER_PORT.into(), PM_TIMER_LEN, timer)?;
    let reset = ResetRegister::new(events.clone());
    pio.insert(RESET_PORT.into(), 1, Arc::new(reset))?;
    let keyboard = KeyboardController::new(events.clone());
    pio.insert(I8042_COMMAND_PORT, 1, Arc::new(keyboard))?;
    Ok(block)
}

fn add_clock(buses: &Buses, ram: &GuestRam) -> Result<(), Error> {
    let rtc = Arc::new(Rtc::new(ram.low_len(), ram.high_len()));
    Ok(buses.pio.insert(rtc::PORT, 2, rtc)?)
}

fn add_serial(
    buses: &Buses,
    chip: &Arc<Chip>,
    parts: &Parts,
) -> Result<Option<Arc<SerialPort>>, Error> {
    let Some((output, input)) = &parts.serial else {
        return Ok(None);
    };
    let line = chip.line(PIN, Trigger::Edge)?;
    let interrupt = RaiseInterrupt(Box::new(move || line.raise()));
    let port = SerialPort::new(interrupt, output.clone(), Arc::clone(input));
    let port = Arc::new(port);
    buses.pio.insert(PORT, PORT_LEN, Arc::clone(&port) as _)?;
    Ok(Some(port))
}

/// What guest memory is made as. A page that the test device takes from KVM is one of its own: in a huge page it would
/// be back with the next access to any of its neighbours.
fn memory_of(config: &VmConfig) -> MemoryConfig {
    MemoryConfig {
        thp: config.memory.thp && !config.platform.test_device,
        ..config.memory
    }
}

fn add_test_device(
    buses: &Buses,
    chip: &Arc<Chip>,
    ram: &GuestRam,
    events: &GuestEvents,
) -> Result<(), Error> {
    let (chip, ram) = (Arc::clone(chip), ram.clone());
    let drive: test_device::DriveLine = Box::new(move |line, high| {
        if let Err(error) = chip.drive(line, high) {
            tracing::warn!(line, high, %error, "the test device");
        }
    });
    let flush: test_device::FlushPage = Box::new(move |gpa| {
        if let Err(error) = ram.unmap_page(gpa) {
            tracing::warn!(gpa, %error, "the test device cannot unmap a page");
        }
    });
    Ok(test_device::insert(buses, drive, flush, events.clone())?)
}

fn pci_host(buses: &Buses, chip: &Arc<Chip>, ram: &GuestRam, events: &GuestEvents) -> PciHost {
    let mut host = PciHost::new(PciContext {
        wiring: Arc::new(Arc::clone(chip)),
        memory: ram.memory().clone(),
        mmio: Arc::clone(&buses.mmio),
        ports: Arc::clone(&buses.pio),
        mmio64_start: mmio64_start(ram.high_len()),
    });
    let events = events.clone();
    host.on_ejection(move |name| events.send(GuestEvent::Ejected(name.to_owned())));
    host
}

fn add_devices(
    host: &mut PciHost,
    config: &VmConfig,
    ram: &GuestRam,
    frontends: &mut Frontends,
) -> Result<Option<balloon::Handle>, Error> {
    let platform = &config.platform;
    let rng = rng::Rng::new("_rng", &config.rng.src)?;
    host.add_builtin("_rng", Box::new(rng))?;
    let balloon = config
        .balloon
        .map(|balloon| add_balloon(host, ram, &balloon));
    for kind in Kind::all(config) {
        let id = kind.id().to_owned();
        let vendor = match frontends.way(&kind)? {
            vhost_user::Way::Window { .. } => pci::LIMITING_VENDOR,
            vhost_user::Way::Direct | vhost_user::Way::Shadow => platform.root_port_vendor,
        };
        let device = frontends.connect(kind)?;
        host.add_below_root_port(&id, device, vendor)?;
    }
    let taken = devices::ids(config).count();
    let free = MAX_EXTERNAL_DEVICES.saturating_sub(taken);
    // What comes later has shadow queues where there is a window: it would not be limited.
    for _ in 0..free.min(platform.hotplug_ports.into()) {
        host.add_empty_root_port(platform.root_port_vendor)?;
    }
    balloon.transpose()
}

fn add_balloon(
    host: &mut PciHost,
    ram: &GuestRam,
    balloon: &BalloonConfig,
) -> Result<balloon::Handle, Error> {
    let device = balloon::Balloon::new(balloon::NAME, balloon, ram)?;
    let handle = device.handle();
    host.add_builtin(balloon::NAME, Box::new(device))?;
    Ok(handle)
}

/// A guest looks for its devices once, when it boots: they must have been there.
fn wait_for_backends(frontends: &Frontends, cancel: &AtomicBool) -> Result<(), Error> {
    while !frontends.wait_settled(CANCEL_POLL) {
        frontends.check_started()?;
        if cancel.load(Ordering::Acquire) {
            return Err(Error::Cancelled);
        }
    }
    Ok(frontends.check_started()?)
}
