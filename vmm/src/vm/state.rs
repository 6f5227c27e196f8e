//! States of the guest, and what is accepted in which of them.
//!
//! Pure: (state, action) decides; the driver acts.

#![forbid(unsafe_code)]

/// State of the guest, as in `vm.info`.
///
/// ```text
///             built                 pause
///   Created ─────────▶ Running ◀──────────▶ Paused
///      ▲  │               │      resume        │
///      │  │ shutdown      │ shutdown           │ shutdown
///      │  └───────────────┼────────────────────┤
///      │                  ▼                    │
///      │ boot          Shutdown ◀──────────────┘
///      └──────────────────┘
///   reboot, by the guest or by request: Running, Paused ─▶ Created
/// ```
///
/// The process outlives `Shutdown` if a request brought it about; a guest that powers itself off ends
/// the process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VmState {
    /// Being put together, perhaps waiting for a backend; no vCPU has run.
    Created,
    /// vCPUs run.
    Running,
    /// All vCPUs are out of the guest.
    Paused,
    /// No machine.
    Shutdown,
}

/// What may be asked of the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
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
}

/// Why an action is not accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// There is no machine that it could be done to.
    #[error("the guest is not running")]
    NotRunning,
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
    use Action::{Boot, Pause, PowerButton, Reboot, Resume, Shutdown};
    match (state, action) {
        (VmState::Shutdown, Boot) => Ok(VmState::Created),
        (VmState::Running | VmState::Paused, Reboot) => Ok(VmState::Created),
        (VmState::Running, Pause) => Ok(VmState::Paused),
        (VmState::Paused, Resume) => Ok(VmState::Running),
        // The button of a paused guest is seen when it runs again.
        (VmState::Running | VmState::Paused, PowerButton) => Ok(state),
        (VmState::Created | VmState::Running | VmState::Paused, Shutdown) => Ok(VmState::Shutdown),
        (VmState::Shutdown, _) => Err(Refusal::NotRunning),
        _ => Err(Refusal::WrongState { state, action }),
    }
}

#[cfg(test)]
mod tests {
    use super::Action::*;
    use super::VmState::{Created, Paused, Running};
    use super::*;

    const ACTIONS: [Action; 6] = [Boot, PowerButton, Pause, Resume, Reboot, Shutdown];

    #[test]
    fn every_state_and_action() {
        let off = VmState::Shutdown;
        let table: [(VmState, [Option<VmState>; 6]); 4] = [
            (Created, [None, None, None, None, None, Some(off)]),
            (
                Running,
                [
                    None,
                    Some(Running),
                    Some(Paused),
                    None,
                    Some(Created),
                    Some(off),
                ],
            ),
            (
                Paused,
                [
                    None,
                    Some(Paused),
                    None,
                    Some(Running),
                    Some(Created),
                    Some(off),
                ],
            ),
            (off, [Some(Created), None, None, None, None, None]),
        ];
        for (state, expected) in table {
            for (action, expected) in ACTIONS.into_iter().zip(expected) {
                assert_eq!(accept(state, action).ok(), expected, "{state:?} {action:?}");
            }
        }
    }

    #[test]
    fn a_refusal_says_what_and_why() {
        assert_eq!(
            accept(Paused, Pause).unwrap_err().to_string(),
            "cannot Pause a guest that is Paused"
        );
        assert_eq!(accept(VmState::Shutdown, Pause), Err(Refusal::NotRunning));
    }
}
