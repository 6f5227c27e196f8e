//! `berth-vmm`: one KVM guest in one process.
//!
//! The VMM boots the guest, runs its vCPUs, answers configuration space and a few slow devices, and
//! keeps the life cycle. Disks and network cards are other processes that speak vhost-user: a doorbell
//! goes from the vCPU to the daemon by ioeventfd, an interrupt comes back by irqfd, and neither enters
//! this process, but where the daemon may not have the guest's memory.
//!
//! ```text
//!   main thread ── event loop: signals, serial input, requests; the one writer of VM state (vm::driver)
//!   boot        ── puts a machine together, waits for backends; teardown ── takes one apart
//!   plug        ── waits for the backend of a device that is added
//!   api         ── HTTP on a unix socket; turns requests into messages for the driver
//!   vcpuN       ── KVM_RUN; exits are dispatched over bus::Bus
//!   balloon     ── gives back to the host what the guest lends it; rng ── fills its buffers of entropy
//!   serial-out  ── writes what the guest prints, so that a slow reader holds up no vCPU
//!   vu-diskN, vu-netN ── one vhost-user session each, off the main loop, with deadlines
//!   shN-diskN   ── copies for a queue of a device whose daemon has none of the guest's memory
//! ```
//!
//! Map, in the order to read: [`vm`] (assembly and life of the guest), [`config`] and [`args`], [`kvm`],
//! [`memory`], [`boot`], [`cpu`], [`bus`], [`pci`], [`devices`], [`vhost_user`], [`api`], [`event_loop`],
//! [`socket`], [`sandbox`].

pub mod api;
pub mod args;
pub mod boot;
pub mod bus;
pub mod config;
pub mod cpu;
pub mod descriptors;
pub mod devices;
pub mod event_loop;
#[doc(hidden)]
pub mod fuzzing;
pub mod kvm;
pub mod launcher;
pub mod memory;
pub mod pci;
pub mod sandbox;
pub mod socket;
pub mod telemetry;
pub mod tuning;
pub mod vhost_user;
pub mod vm;
