//! States of the guest, and what is accepted in which of them.
//!
//! Pure: (state, action) decides; the driver acts.

#![forbid(unsafe_code)]

/// State of the guest. `vm.info` shows `Booting` as `Created`, and answers 404 to `NotCreated`.
///
/// ```text
///                   create              boot                built                pause
///   NotCreated ───────────▶ Created ────────────▶ Booting ────────▶ Running ◀──────────▶ Paused
///       ▲                      │                   ▲  │                │       resume        │
///       │                      │                   │  │ shutdown,      │ shutdown            │ shutdown
///       │        delete        │              boot │  │ not built      ▼                     ▼
///       └──────────────────────┴───────────────────┼──┴──────────▶ Shutdown ◀───────────────┘
///          (from every state)                      └───────────────────┘
///
///   reboot, by the guest or by request: Running, Paused ─▶ Booting
///   add-*, remove-device, resize: Created, Shutdown (the configuration alone), Running, Paused (the slot too)
/// ```
///
/// A VMM whose command line names a kernel begins with `create` and `boot`. The process outlives
/// `Shutdown` if a request brought it about; a guest that powers itself off ends the process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VmState {
    /// No configuration.
    NotCreated,
    /// A configuration that was never booted.
    Created,
    /// Being put together, perhaps waiting for a backend; no vCPU has run.
    Booting,
    /// vCPUs run.
    Running,
    /// All vCPUs are out of the guest.
    Paused,
    /// A configuration whose machine is gone.
    Shutdown,
}

impl VmState {
    /// Whether there is a machine with vCPUs.
    pub fn has_machine(self) -> bool {
        matches!(self, Self::Running | Self::Paused)
    }
}

/// What may be asked of the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Take a configuration.
    Create,
    /// Put a new machine together and run it.
    Boot,
    /// Press the power button.
    PowerButton,
    /// Stop the vCPUs.
    Pause,
    /// Let them run again.
    Resume,
    /// Pull the plug and plug in again.
    Reboot,
    /// Pull the plug.
    Shutdown,
    /// Pull the plug and forget the configuration.
    Delete,
    /// Give the guest more or less of something.
    Resize,
    /// Add a device to the configuration, and to the machine if there is one.
    AddDevice,
    /// Take a device out of the configuration, and out of the machine if there is one.
    RemoveDevice,
}

/// Why an action is not accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// There is no configuration.
    #[error("the VM is not created")]
    NotCreated,
    /// The machine is not in the state for it.
    #[error("cannot {action:?} a guest that is {state:?}")]
    WrongState {
        /// The state.
        state: VmState,
        /// What was asked.
        action: Action,
    },
}

/// Whether `action` is accepted in `state`; if so, the state once it is done.
pub fn accept(state: VmState, action: Action) -> Result<VmState, Refusal> {
    use Action::{
        AddDevice, Boot, Create, Delete, Pause, PowerButton, Reboot, RemoveDevice, Resize, Resume,
        Shutdown,
    };
    use VmState::{Booting, Created, NotCreated, Paused, Running};
    match (state, action) {
        (NotCreated, Create) => Ok(Created),
        // Nothing is there, which is what was wanted.
        (_, Delete) => Ok(NotCreated),
        (NotCreated, _) => Err(Refusal::NotCreated),
        (Created | VmState::Shutdown, Boot) => Ok(Booting),
        (Running | Paused, Reboot) => Ok(Booting),
        (Running, Pause) => Ok(Paused),
        (Paused, Resume) => Ok(Running),
        // The button of a paused guest is seen when it runs again.
        (Running | Paused, PowerButton) => Ok(state),
        (Booting | Running | Paused, Shutdown) => Ok(VmState::Shutdown),
        // While a machine is put together its devices are being counted.
        (Created | VmState::Shutdown | Running | Paused, AddDevice | RemoveDevice | Resize) => {
            Ok(state)
        }
        _ => Err(Refusal::WrongState { state, action }),
    }
}

#[cfg(test)]
mod tests {
    use super::Action::*;
    use super::VmState::{Booting, Created, NotCreated, Paused, Running};
    use super::*;

    const ACTIONS: [Action; 11] = [
        Create,
        Boot,
        PowerButton,
        Pause,
        Resume,
        Reboot,
        Shutdown,
        Delete,
        AddDevice,
        RemoveDevice,
        Resize,
    ];

    #[test]
    #[rustfmt::skip]
    fn every_state_and_action() {
        let off = Some(VmState::Shutdown);
        let (none, made, boot) = (Some(NotCreated), Some(Created), Some(Booting));
        let (run, held) = (Some(Running), Some(Paused));
        // In the order of ACTIONS.
        let table: [(VmState, [Option<VmState>; 11]); 6] = [
            (NotCreated, [made, None, None, None, None, None, None, none, None, None, None]),
            (Created, [None, boot, None, None, None, None, None, none, made, made, made]),
            (Booting, [None, None, None, None, None, None, off, none, None, None, None]),
            (Running, [None, None, run, held, None, boot, off, none, run, run, run]),
            (Paused, [None, None, held, None, run, boot, off, none, held, held, held]),
            (VmState::Shutdown, [None, boot, None, None, None, None, None, none, off, off, off]),
        ];
        for (state, expected) in table {
            for (action, expected) in ACTIONS.into_iter().zip(expected) {
                assert_eq!(accept(state, action).ok(), expected, "{state:?} {action:?}");
            }
        }
    }

    #[test]
    fn without_a_configuration_every_refusal_says_so() {
        for action in ACTIONS {
            if let Err(refusal) = accept(NotCreated, action) {
                assert_eq!(refusal, Refusal::NotCreated, "{action:?}");
            }
        }
    }

    #[test]
    fn a_refusal_says_what_and_why() {
        assert_eq!(
            accept(Paused, Pause).unwrap_err().to_string(),
            "cannot Pause a guest that is Paused"
        );
        assert_eq!(
            accept(NotCreated, Pause).unwrap_err().to_string(),
            "the VM is not created"
        );
    }
}
