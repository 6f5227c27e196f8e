//! The cases: one file a feature, each a few stories (`berth_tests_framework::story`).
//!
//! `berth-cases` runs them. What needs no KVM is in the tier `client`, what boots a guest under berth-vmm in
//! the tier `guest`. One boot answers many questions, as booting costs more than most of them.

#![forbid(unsafe_code)]

mod any_device;
pub mod backend_loss;
pub mod bad_input;
pub mod balloon;
pub mod blocks;
pub mod boot;
pub mod counters;
mod cpu;
pub mod disk;
mod foreign;
pub mod hotplug;
pub mod huge_pages;
pub mod interop_dpdk;
pub mod interop_qemu;
pub mod interop_qemu_img;
pub mod irqchip;
pub mod kill_storm;
pub mod ksm;
pub mod kvm_unit_tests;
mod memory;
pub mod merging;
pub mod migration;
pub mod modes;
pub mod net;
pub mod net_control;
mod own_daemons;
pub mod pci;
pub mod power;
pub mod shadow;
pub mod storm;
pub mod tuner;
pub mod upgrade;
pub mod window;

use berth_tests_framework::story::Story;

/// Every story, the long ones first where they could end a parallel run late.
#[must_use]
pub fn stories() -> Vec<Story> {
    [
        net::STORIES,
        disk::STORIES,
        boot::STORIES,
        irqchip::STORIES,
        counters::STORIES,
        backend_loss::STORIES,
        net_control::STORIES,
        pci::STORIES,
        hotplug::STORIES,
        power::STORIES,
        storm::STORIES,
        kill_storm::STORIES,
        kvm_unit_tests::STORIES,
        ksm::STORIES,
        interop_qemu::STORIES,
        interop_dpdk::STORIES,
        interop_qemu_img::STORIES,
        migration::STORIES,
        upgrade::STORIES,
        any_device::STORIES,
        foreign::STORIES,
        window::STORIES,
        shadow::STORIES,
        merging::STORIES,
        modes::STORIES,
        own_daemons::STORIES,
        balloon::STORIES,
        huge_pages::STORIES,
        tuner::STORIES,
        bad_input::STORIES,
    ]
    .concat()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn names_are_unique() {
        let stories = stories();
        let names: BTreeSet<_> = stories.iter().map(|story| story.name).collect();
        assert_eq!(names.len(), stories.len());
        let checks: Vec<_> = stories.iter().flat_map(|story| story.checks).collect();
        assert_eq!(checks.iter().collect::<BTreeSet<_>>().len(), checks.len());
    }
}
