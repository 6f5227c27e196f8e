//! Takes a VM's interrupt state out of KVM, and puts it into another VM.
//!
//! Order of a save: no vCPU runs; [`Chip::hold`]; [`VcpuState::save`] of each vCPU; [`Held::save`].
//!
//! Order of a restore, as each step is looked at by the next: lines and vectors are made; each vCPU has its
//! CPUID and registers; [`VcpuState::restore`] of each vCPU; [`Chip::restore`], which may deliver what was
//! pending. Within a vCPU: APIC base, TSC, local APIC, then the deadline, which the local APIC's mode gives
//! its meaning.
//!
//! Time does not pass between the two for the guest: TSC and KVM clock go on where they were. Who wants the
//! guest to know how late it is sets its clock by other means.
//!
//! Reference: KVM api.rst, `KVM_GET_IRQCHIP`, `KVM_GET_PIT2`, `KVM_GET_LAPIC`, `KVM_GET_VCPU_EVENTS`,
//! `KVM_GET_CLOCK`, and their counterparts.
#![allow(unsafe_code, reason = "KVM's structures as bytes")]

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, Msrs, kvm_clock_data,
    kvm_irqchip, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_pit_state2, kvm_vcpu_events,
};
use kvm_ioctls::VcpuFd;

use crate::state::{
    CONTROLLER_LEN, ChipState, Controllers, EVENTS_LEN, LAPIC_LEN, PIT_LEN, StateError, VcpuState,
    VectorState,
};
use crate::{Chip, Error, Held, IOAPIC_PINS, Msi, pit, sys};

const IA32_TSC: u32 = 0x10;
const IA32_APIC_BASE: u32 = 0x1b;
const IA32_TSC_ADJUST: u32 = 0x3b;
const IA32_TSC_DEADLINE: u32 = 0x6e0;
const KVM_WALL_CLOCK: u32 = 0x4b56_4d00;
const KVM_SYSTEM_TIME: u32 = 0x4b56_4d01;
const KVM_PV_EOI: u32 = 0x4b56_4d04;

/// A vCPU's MSRs that belong to interrupts and clocks, in the order of a restore; the last one after the
/// local APIC.
pub(crate) const MSRS: [u32; 7] = [
    IA32_APIC_BASE,
    IA32_TSC,
    IA32_TSC_ADJUST,
    KVM_WALL_CLOCK,
    KVM_SYSTEM_TIME,
    KVM_PV_EOI,
    IA32_TSC_DEADLINE,
];

const KERNEL_CHIPS: [u32; 3] = [
    KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE,
    KVM_IRQCHIP_IOAPIC,
];

fn kvm(what: &'static str) -> impl Fn(kvm_ioctls::Error) -> Error {
    move |source| Error::State { what, source }
}

/// A structure of KVM's that is plain numbers from its first byte to its last.
///
/// # Safety
/// `repr(C)`, no padding, every bit pattern valid, and `N` its size.
unsafe trait Plain<const N: usize>: Sized + Copy {
    fn to_array(&self) -> [u8; N] {
        const { assert!(size_of::<Self>() == N) };
        // SAFETY: both have N bytes, and by the trait all of them are initialised.
        unsafe { std::mem::transmute_copy(self) }
    }

    fn from_array(bytes: &[u8; N]) -> Self {
        const { assert!(size_of::<Self>() == N) };
        // SAFETY: both have N bytes, and by the trait every pattern is valid.
        unsafe { std::mem::transmute_copy(bytes) }
    }
}

// SAFETY: three channels of u32, u16, ten u8 and i64 (24 bytes, none between them), u32, [u32; 9].
unsafe impl Plain<PIT_LEN> for kvm_pit_state2 {}
// SAFETY: [i8; 1024].
unsafe impl Plain<LAPIC_LEN> for kvm_lapic_state {}
// SAFETY: u8 and u32 with what would be padding named as fields, 64 bytes (KVM api.rst).
unsafe impl Plain<EVENTS_LEN> for kvm_vcpu_events {}

impl Held<'_> {
    /// What the chip, its vectors and the clock are now, with the states of all vCPUs, which were saved since
    /// the chip is held.
    pub fn save(&self, vcpus: &[VcpuState]) -> Result<ChipState, Error> {
        let chip = self.chip;
        let (controllers, driven, pending) = match chip.pins() {
            Some(pins) => {
                let controllers = Controllers::Split {
                    ioapic: Box::new(pins.ioapic.clone()),
                    ended: pins.ended(vcpus),
                };
                (controllers, pins.driven(), pins.pending())
            }
            None => {
                let wires = chip.wires();
                (chip.save_kernel()?, wires.driven(), wires.pending())
            }
        };
        let mut vectors: Vec<_> = self.msis.iter().map(|msi| chip.save_vector(msi)).collect();
        vectors.sort_by_key(|vector| vector.gsi);
        let clock = chip.vm().get_clock().map_err(kvm("KVM clock"))?;
        Ok(ChipState {
            controllers,
            driven,
            pending,
            vectors,
            clock_ns: clock.clock,
        })
    }
}

impl Chip {
    /// Puts saved state into a new VM's chip, whose lines and vectors have been made in the same order. To
    /// be called after all vCPUs are restored, before any runs.
    ///
    /// # Errors
    /// If the state is another mode's, names a vector that is not among `msis`, or KVM refuses it. The chip
    /// is then of no use.
    pub fn restore(&self, state: &ChipState, msis: &[&Msi]) -> Result<(), Error> {
        if state.mode() != self.mode() {
            let why = format!(
                "{:?} does not fit a chip of {:?}",
                state.mode(),
                self.mode()
            );
            return Err(StateError::new("mode", why).into());
        }
        let clock = kvm_clock_data {
            clock: state.clock_ns,
            ..Default::default()
        };
        self.vm().set_clock(&clock).map_err(kvm("KVM clock"))?;
        match &state.controllers {
            Controllers::Kernel { chips, pit } => {
                self.restore_kernel_driven(state.driven)?;
                self.restore_kernel(chips, pit)?;
            }
            Controllers::Split { ioapic, .. } => {
                if let Some(mut pins) = self.pins() {
                    pins.restore(self, (**ioapic).clone(), state.driven)?;
                }
            }
        }
        self.restore_vectors(&state.vectors, msis)?;
        if let (Controllers::Split { ended, .. }, Some(mut pins)) =
            (&state.controllers, self.pins())
        {
            pins.end(self, *ended);
        }
        match self.pins() {
            Some(mut pins) => pins.set_pending(state.pending),
            None => self.wires().set_pending(state.pending),
        }
        .map_err(Error::EventFd)
    }

    fn save_vector(&self, msi: &Msi) -> VectorState {
        let pending = msi.is_pending();
        let (message, masked) = self.vector_setting(msi.gsi());
        VectorState {
            gsi: msi.gsi(),
            message,
            masked,
            pending,
        }
    }

    fn restore_vectors(&self, vectors: &[VectorState], msis: &[&Msi]) -> Result<(), Error> {
        let mut found = Vec::new();
        for vector in vectors {
            let msi = msis.iter().find(|msi| msi.gsi() == vector.gsi);
            let msi = msi.ok_or_else(|| {
                let why = format!("no vector here has GSI {}", vector.gsi);
                StateError::new("vectors.gsi", why)
            })?;
            found.push((vector, *msi));
        }
        // Pending before it is attached: KVM looks at the eventfd when it attaches it.
        for (vector, msi) in &found {
            if vector.pending {
                msi.event().write(1).map_err(Error::EventFd)?;
            }
        }
        self.batch(|batch| {
            for (vector, msi) in &found {
                if let Some(message) = vector.message {
                    batch.set_message(msi, message);
                }
                if vector.masked {
                    batch.mask(msi);
                } else {
                    batch.unmask(msi);
                }
            }
        })
    }

    fn save_kernel(&self) -> Result<Controllers, Error> {
        let mut chips = Box::new([[0; CONTROLLER_LEN]; 3]);
        for (chip_id, bytes) in KERNEL_CHIPS.into_iter().zip(chips.iter_mut()) {
            let mut chip = kvm_irqchip {
                chip_id,
                ..Default::default()
            };
            self.vm().get_irqchip(&mut chip).map_err(kvm("irqchip"))?;
            // SAFETY: the member is the whole union as bytes, which `default` has zeroed.
            *bytes = unsafe { chip.chip.dummy }.map(|byte| byte as u8);
        }
        let mut pit = self.vm().get_pit2().map_err(kvm("PIT"))?;
        pit::keep_counting(&mut pit, sys::monotonic_ns());
        Ok(Controllers::Kernel {
            chips,
            pit: Box::new(pit.to_array()),
        })
    }

    /// Tells KVM who holds a pin high, which is not in its registers: it would let go of the pin as soon as one
    /// other source does. Before the registers, while all pins are masked: they say what of it was delivered.
    fn restore_kernel_driven(&self, driven: u32) -> Result<(), Error> {
        for pin in (0..IOAPIC_PINS).filter(|pin| driven >> pin & 1 != 0) {
            self.drive(pin, true)?;
        }
        Ok(())
    }

    fn restore_kernel(
        &self,
        chips: &[[u8; CONTROLLER_LEN]; 3],
        pit: &[u8; PIT_LEN],
    ) -> Result<(), Error> {
        for (chip_id, bytes) in KERNEL_CHIPS.into_iter().zip(chips) {
            let mut chip = kvm_irqchip {
                chip_id,
                ..Default::default()
            };
            chip.chip.dummy = bytes.map(|byte| byte as i8);
            self.vm().set_irqchip(&chip).map_err(kvm("irqchip"))?;
        }
        let pit = kvm_pit_state2::from_array(pit);
        self.vm().set_pit2(&pit).map_err(kvm("PIT"))
    }
}

impl VcpuState {
    /// What a vCPU that does not run has of interrupts and clocks.
    pub fn save(vcpu: &VcpuFd) -> Result<Self, Error> {
        let mp_state = vcpu.get_mp_state().map_err(kvm("MP state"))?.mp_state;
        let lapic = vcpu.get_lapic().map_err(kvm("local APIC"))?;
        let events = vcpu.get_vcpu_events().map_err(kvm("vCPU events"))?;
        let mut msrs = Vec::new();
        for index in MSRS {
            if let Some(value) = get_msr(vcpu, index)? {
                msrs.push((index, value));
            }
        }
        Ok(Self {
            lapic: Box::new(lapic.to_array()),
            events: Box::new(events.to_array()),
            mp_state,
            msrs,
        })
    }

    /// Puts it into a vCPU of another VM, which has its CPUID and registers.
    pub fn restore(&self, vcpu: &VcpuFd) -> Result<(), Error> {
        let (late, early): (Vec<_>, Vec<_>) = self
            .msrs
            .iter()
            .partition(|(index, _)| *index == IA32_TSC_DEADLINE);
        for (index, value) in early {
            set_msr(vcpu, index, value)?;
        }
        let lapic = kvm_lapic_state::from_array(&self.lapic);
        vcpu.set_lapic(&lapic).map_err(kvm("local APIC"))?;
        let events = kvm_vcpu_events::from_array(&self.events);
        vcpu.set_vcpu_events(&events).map_err(kvm("vCPU events"))?;
        let mp_state = kvm_mp_state {
            mp_state: self.mp_state,
        };
        vcpu.set_mp_state(mp_state).map_err(kvm("MP state"))?;
        for (index, value) in late {
            set_msr(vcpu, index, value)?;
        }
        Ok(())
    }
}

fn one_msr(index: u32, data: u64) -> Msrs {
    let entry = kvm_msr_entry {
        index,
        data,
        ..Default::default()
    };
    Msrs::from_entries(&[entry]).expect("one is fewer than KVM's limit")
}

/// `None` where KVM has no such MSR.
fn get_msr(vcpu: &VcpuFd, index: u32) -> Result<Option<u64>, Error> {
    let mut msrs = one_msr(index, 0);
    let read = vcpu.get_msrs(&mut msrs).map_err(kvm("MSRs"))?;
    Ok((read == 1).then(|| msrs.as_slice()[0].data))
}

fn set_msr(vcpu: &VcpuFd, index: u32, value: u64) -> Result<(), Error> {
    match vcpu.set_msrs(&one_msr(index, value)).map_err(kvm("MSRs"))? {
        1 => Ok(()),
        _ => {
            let why = format!("KVM refuses {value:#x} for {index:#x}");
            Err(StateError::new("msrs.value", why).into())
        }
    }
}
