//! The two 8259 PICs as firmware leaves them: where a real-mode program expects their vectors.
//!
//! KVM's PICs come out of reset without a vector base, as the hardware does; on a PC it is firmware that
//! writes ICW1 to ICW4. Operating systems do that anew, so only a guest that is started without firmware
//! and relies on what that leaves behind needs this. Intel 8259A data sheet, "initialization command words".
#![expect(
    unsafe_code,
    reason = "KVM_GET_IRQCHIP and KVM_SET_IRQCHIP pass a union of controllers"
)]

use kvm_bindings::{KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_irqchip};

use crate::{Chip, Error};

/// Vector of ISA interrupt 0 in real mode.
const MASTER_BASE: u8 = 0x08;
/// Vector of ISA interrupt 8 in real mode.
const SLAVE_BASE: u8 = 0x70;

impl Chip {
    /// Initialises both PICs for real mode (vectors 0x08 and 0x70), with nothing masked: what is pending is
    /// delivered as soon as the boot processor allows it. To be called before it runs; an error where KVM
    /// has no PICs.
    pub fn initialise_pics(&self) -> Result<(), Error> {
        for (chip_id, base) in [
            (KVM_IRQCHIP_PIC_MASTER, MASTER_BASE),
            (KVM_IRQCHIP_PIC_SLAVE, SLAVE_BASE),
        ] {
            let mut chip = kvm_irqchip {
                chip_id,
                ..Default::default()
            };
            let vm = self.vm();
            vm.get_irqchip(&mut chip).map_err(Error::InitialisePic)?;
            // SAFETY: of the union KVM has filled the member that the chip id names, and all members are
            // plain numbers, of which any value is valid.
            let pic = unsafe { &mut chip.chip.pic };
            pic.irq_base = base;
            pic.imr = 0;
            pic.init_state = 0;
            pic.init4 = 1;
            vm.set_irqchip(&chip).map_err(Error::InitialisePic)?;
        }
        Ok(())
    }
}
