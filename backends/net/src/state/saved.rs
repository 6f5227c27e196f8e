//! What the driver has set, as bytes, for a successor of this process.
//!
//! Kept by the control queue beside its marks in the in-flight region (queue-worker's
//! `saved_state`), where the frontend has one. The bytes have been in the frontend's hands: they
//! are checked like a command.
//!
//! ```text
//!   version u8 │ features u64 │ has address u8 │ address [u8; 6] │ offloads u64 │ pairs u16 │ filter
//! ```

#![forbid(unsafe_code)]

use std::sync::atomic::Ordering;

use super::{DeviceState, lock};
use crate::device::GUEST_OFFLOADS;
use crate::filter::RxFilter;
use crate::mac::Mac;

const VERSION: u8 = 1;

impl DeviceState {
    /// What [`restore`](DeviceState::restore) takes.
    #[must_use]
    pub fn saved(&self) -> Vec<u8> {
        let (features, mac) = {
            let driver = lock(&self.driver);
            (driver.features, driver.mac)
        };
        let pairs = lock(&self.pairs).active;
        let mut bytes = vec![VERSION];
        bytes.extend(features.to_le_bytes());
        bytes.push(u8::from(mac.is_some()));
        bytes.extend(mac.unwrap_or(Mac([0; 6])).0);
        bytes.extend(self.offloads.load(Ordering::Relaxed).to_le_bytes());
        bytes.extend(pairs.to_le_bytes());
        lock(&self.filter).encode(&mut bytes);
        bytes
    }

    /// Goes on with what an earlier process had saved for the same driver; false, and nothing
    /// changed, where the bytes are not that.
    pub fn restore(&self, bytes: &[u8]) -> bool {
        let features = lock(&self.driver).features;
        let Some(saved) = Saved::parse(bytes, features, self.identity().pairs) else {
            return false;
        };
        lock(&self.driver).mac = saved.mac;
        self.update_filter(|filter| *filter = saved.filter);
        if let Err(error) = self.set_offloads(saved.offloads) {
            tracing::warn!(%error, "cannot set the port's offloads");
        }
        self.change_pairs(|pairs, _| pairs.active = saved.pairs);
        true
    }
}

#[derive(Debug, PartialEq, Eq)]
struct Saved {
    mac: Option<Mac>,
    offloads: u64,
    pairs: u16,
    filter: RxFilter,
}

impl Saved {
    fn parse(bytes: &[u8], features: u64, max_pairs: u16) -> Option<Self> {
        let ([version], rest) = bytes.split_first_chunk()?;
        let (saved_features, rest) = rest.split_first_chunk()?;
        let ([has_mac], rest) = rest.split_first_chunk()?;
        let (mac, rest) = rest.split_first_chunk()?;
        let (offloads, rest) = rest.split_first_chunk()?;
        let (pairs, rest) = rest.split_first_chunk()?;
        let mac = (*has_mac != 0).then_some(Mac(*mac));
        let offloads = u64::from_le_bytes(*offloads);
        let pairs = u16::from_le_bytes(*pairs);
        let same_driver = *version == VERSION && u64::from_le_bytes(*saved_features) == features;
        let possible =
            offloads & !(features & GUEST_OFFLOADS) == 0 && (1..=max_pairs).contains(&pairs);
        if !same_driver || !possible {
            return None;
        }
        Some(Self {
            mac,
            offloads,
            pairs,
            filter: RxFilter::decode(features, mac, rest)?,
        })
    }
}
