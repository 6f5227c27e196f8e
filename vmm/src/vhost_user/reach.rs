//! How a device reaches guest memory, and when it changes over.
//!
//! | memory | `dma=` | the device |
//! |---|---|---|
//! | shared | – | maps all of it |
//! | any | `shadow` | shadow queues |
//! | window | – | the window; shadow queues for a driver that does not keep to it |
//! | window | `window` | the window, or nothing |
//! | window, added while the guest runs | – | shadow queues: Linux limits what it finds at boot |
//! | private | – | shadow queues |
//!
//! ```text
//!  DRIVER_OK ─▶ bit 33 taken, rings inside? ──▶ window ──▶ the backend gives a queue up ─▶ NEEDS_RESET ─┐
//!                  │ no                                                                                 │
//!                  └──────────────────────────▶ shadow ◀─────── next DRIVER_OK ◀── reset ◀──────────────┘
//! ```
//!
//! A device whose backend once met a buffer outside the window has shadow queues until it goes.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use vm_memory::GuestMemoryMmap;

use super::kind::{Kind, Offer};
use super::shadow::{Bounce, Workers};
use super::shared::{Ring, Rings, Shared};
use super::window::{ADVICE, Window};
use crate::config::Dma;
use crate::devices::virtio::device::Activation;
use crate::memory;
use crate::telemetry::LogLimit;

/// A driver can start over as often as it likes.
static CHANGES: LogLimit = LogLimit::new(Duration::from_secs(1));

/// What the devices of a guest find.
#[derive(Debug, Clone, Default)]
pub(super) enum Guest {
    /// All memory is shared.
    #[default]
    Shared,
    /// A window of it is.
    Window(Window),
    /// None is.
    Private,
}

/// How one of them is to reach it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// All of it is mapped.
    Direct,
    /// The window is; `or_shadow`: shadow queues where that does not do.
    Window {
        /// Whether there is another way.
        or_shadow: bool,
    },
    /// Shadow queues.
    Shadow,
}

impl Guest {
    /// The way of a device; `late`: it comes while the guest runs.
    ///
    /// # Errors
    /// Where there is none as asked.
    pub(super) fn way(&self, kind: &Kind, late: bool) -> Result<Way, String> {
        match (self, kind.dma()) {
            (_, Dma::Shadow) | (Self::Private, Dma::Auto) => Ok(Way::Shadow),
            (Self::Shared, _) => Ok(Way::Direct),
            (Self::Window(_), Dma::Auto) if late => Ok(Way::Shadow),
            (Self::Window(_), Dma::Window) if late => Err(format!(
                "{} cannot be added while the guest runs with dma=window, as Linux limits what it finds at boot: \
                 leave dma= out for shadow queues, or add it before",
                kind.id()
            )),
            (Self::Window(_), asked) => Ok(Way::Window {
                or_shadow: asked == Dma::Auto,
            }),
            (Self::Private, Dma::Window) => Err(format!(
                "{}: dma=window, and this guest has no window, as it booted without such a device: leave dma= out \
                 for shadow queues",
                kind.id()
            )),
        }
    }

    /// All that it takes to go that way. Makes files, so not on a vCPU's thread.
    pub(super) fn reach(&self, kind: &Kind, way: Way) -> Result<Reach, memory::Error> {
        let bounce = || Bounce::new(kind.device_type(), &kind.queue_sizes()).map(Arc::new);
        Ok(match (way, self) {
            (Way::Window { or_shadow }, Self::Window(window)) => Reach::Window {
                window: window.clone(),
                bounce: or_shadow.then(bounce).transpose()?,
                left: AtomicBool::new(false),
            },
            (Way::Shadow, _) => Reach::Shadow(bounce()?),
            _ => Reach::Direct,
        })
    }
}

/// How a device reaches guest memory.
#[derive(Debug)]
pub(super) enum Reach {
    /// Its backend maps all of it.
    Direct,
    /// Its backend maps a window.
    Window {
        window: Window,
        /// For shadow queues, where these may be.
        bounce: Option<Arc<Bounce>>,
        /// Whether the window turned out not to do.
        left: AtomicBool,
    },
    /// Its backend maps bounce memory.
    Shadow(Arc<Bounce>),
}

impl Reach {
    fn bounce(&self) -> Option<&Arc<Bounce>> {
        match self {
            Self::Direct => None,
            Self::Window { bounce, .. } => bounce.as_ref(),
            Self::Shadow(bounce) => Some(bounce),
        }
    }

    /// Features that the guest is offered besides.
    pub(super) fn features(&self) -> u64 {
        match self {
            Self::Window { window, .. } => window.features(),
            Self::Direct | Self::Shadow(_) => 0,
        }
    }

    /// Whether a driver that chose these can be served.
    pub(super) fn accepts(&self, device: &str, chosen: u64) -> bool {
        match self {
            Self::Window {
                window,
                bounce: None,
                ..
            } => window.accepts(device, chosen),
            _ => true,
        }
    }

    /// An offer, less what shadow queues cannot do where there may be some.
    pub(super) fn limit(&self, kind: &Kind, offer: Offer) -> Offer {
        match self.bounce() {
            Some(_) => kind.for_shadow(offer),
            None => offer,
        }
    }

    /// The rings that a backend is to run for a driver's, and who copies between the two, if somebody has to.
    ///
    /// # Errors
    /// Why there are none.
    pub(super) fn start(
        &self,
        shared: &Arc<Shared>,
        activation: Activation,
    ) -> Result<(Rings, Option<Workers>), String> {
        let features = Window::without_ours(activation.features);
        let rings = |setups: Vec<_>, memory: &GuestMemoryMmap| Rings {
            features,
            rings: setups.into_iter().map(Ring::new).collect(),
            memory: memory.clone(),
            can_be_shadowed: false,
        };
        let reason = match self {
            Self::Direct => return Ok((rings(activation.queues, &activation.memory), None)),
            Self::Shadow(_) => None,
            Self::Window { window, left, .. } => match self.leaves(window, left, &activation) {
                None => {
                    let mut rings = rings(activation.queues, window.memory());
                    rings.can_be_shadowed = self.bounce().is_some();
                    return Ok((rings, None));
                }
                reason => reason,
            },
        };
        let Some(bounce) = self.bounce() else {
            return Err(format!("{}: {ADVICE}", reason.unwrap_or_default()));
        };
        say(shared, reason.as_deref());
        let (workers, rings) = Workers::start(bounce, activation, shared)?;
        let rings = Rings {
            features,
            rings,
            memory: bounce.memory().clone(),
            can_be_shadowed: false,
        };
        Ok((rings, Some(workers)))
    }

    /// Why a driver is not to be served in the window, if it is not.
    fn leaves(
        &self,
        window: &Window,
        left: &AtomicBool,
        activation: &Activation,
    ) -> Option<String> {
        if left.load(Ordering::Acquire) {
            return Some("its backend met a buffer outside the DMA window".to_owned());
        }
        if self.bounce().is_some() && !window.has_taken(activation.features) {
            return Some("its driver does not take VIRTIO_F_ACCESS_PLATFORM".to_owned());
        }
        window.check(&activation.queues).err()
    }

    /// A backend gave up one of these rings: the driver's next ones have shadows, if it may be for the window.
    pub(super) fn gave_up(&self, rings: &Rings) {
        if let Self::Window { left, .. } = self {
            left.fetch_or(rings.can_be_shadowed, Ordering::AcqRel);
        }
    }

    /// What to say beside a queue that a backend gave up.
    pub(super) fn suspicion(&self, rings: &Rings) -> &'static str {
        match self {
            Self::Window { .. } if rings.can_be_shadowed => {
                "; a buffer may be outside its memory: with the next reset it gets shadow queues"
            }
            Self::Window {
                window,
                bounce: None,
                ..
            } => window.suspicion(),
            _ => "",
        }
    }

    /// What shadow queues have come to, where there may be some.
    pub(super) fn counters(&self) -> Option<Vec<(&'static str, u64)>> {
        self.bounce().map(|bounce| bounce.counters())
    }
}

fn say(shared: &Shared, reason: Option<&str>) {
    let device = shared.id();
    match reason {
        None => tracing::debug!(device, "served by shadow queues, as configured"),
        Some(reason) => {
            if let Some(suppressed) = CHANGES.pass() {
                tracing::info!(device, suppressed, reason, "served by shadow queues");
            }
        }
    }
}
