//! The frontend's side of the dirty log: switches it on and off, and holds it against what really
//! changed in guest memory.

use std::collections::BTreeSet;

use super::{FakeDriver, GuestRam};
use crate::features;
use crate::log::LOG_PAGE;

/// A dirty log of everything that the device of a [`FakeDriver`] writes.
///
/// ```text
///   pause ─▶ the test adds requests ─▶ run: snapshot, enable, …, pause, compare
/// ```
#[derive(Debug)]
pub struct LogWatch {
    log: GuestRam,
}

impl LogWatch {
    /// Switches logging on, for buffers and used rings, while the rings run.
    pub fn start(driver: &mut FakeDriver) -> LogWatch {
        let info = driver.ram.info();
        let size = (info.gpa + info.size).div_ceil(8 * LOG_PAGE);
        let log = GuestRam::new(0, size);
        let watch = LogWatch { log };
        assert_eq!(driver.frontend.set_log_base(size, 0, watch.log.fd()), 0);
        watch.switch(driver, true);
        watch
    }

    /// Switches logging off; the log stays where it is.
    pub fn stop(&self, driver: &mut FakeDriver) {
        self.switch(driver, false);
    }

    fn switch(&self, driver: &mut FakeDriver, on: bool) {
        let log_all = u64::from(on) << features::LOG_ALL;
        driver.frontend.set_features(driver.features | log_all);
        for queue in &driver.queues {
            driver.frontend.set_vring_addr_logged(queue, on);
        }
    }

    /// The log's memory, for a frontend that plays tricks with it.
    pub fn memory(&self) -> &GuestRam {
        &self.log
    }

    /// Takes the marked pages out of the log, as guest addresses.
    pub fn take(&self) -> BTreeSet<u64> {
        let size = self.log.info().size as usize;
        let bits = self.log.read(0, size);
        self.log.slice(0, size).fill(0, size, 0).unwrap();
        // A word at a time: hardly any page is marked.
        let words = bits
            .chunks(8)
            .enumerate()
            .filter(|(_, word)| **word != [0; 8]);
        words
            .flat_map(|(at, word)| {
                let set =
                    move |bit: &usize| word.get(bit / 8).is_some_and(|b| b >> (bit % 8) & 1 != 0);
                (0..64)
                    .filter(set)
                    .map(move |bit| (64 * at + bit) as u64 * LOG_PAGE)
            })
            .collect()
    }

    /// Disables all rings: nothing is in flight, and the device writes nothing.
    pub fn pause(&self, driver: &mut FakeDriver) {
        set_enabled(driver, false);
    }

    /// Lets the rings run for as long as `act` does; they are paused before and after. Every page
    /// that the device changed must be in the log, or the test fails. Returns the log.
    pub fn run(&self, driver: &mut FakeDriver, act: impl FnOnce(&mut FakeDriver)) -> BTreeSet<u64> {
        self.take();
        let before = snapshot(driver);
        set_enabled(driver, true);
        act(driver);
        set_enabled(driver, false);
        let (after, logged) = (snapshot(driver), self.take());
        let page_size = LOG_PAGE as usize;
        let pages = before.chunks(page_size).zip(after.chunks(page_size));
        for (page, (old, new)) in (driver.ram.info().gpa..)
            .step_by(page_size)
            .zip(pages)
            .filter(|(page, (old, new))| old != new && !logged.contains(page))
        {
            for (gpa, (old, new)) in (page..).zip(old.iter().zip(new)) {
                assert!(
                    old == new || is_drivers(driver, gpa),
                    "the device wrote to gpa {gpa:#x}, which the log does not know"
                );
            }
        }
        logged
    }
}

fn set_enabled(driver: &mut FakeDriver, on: bool) {
    for queue in &driver.queues {
        driver.frontend.set_enable(queue.index(), on);
    }
}

fn snapshot(driver: &FakeDriver) -> Vec<u8> {
    let info = driver.ram.info();
    driver.ram.read(info.gpa, info.size as usize)
}

/// Whether the driver writes there by itself: descriptors and available rings.
fn is_drivers(driver: &FakeDriver, gpa: u64) -> bool {
    driver.queues.iter().any(|queue| {
        let ([desc, avail, _], size) = (queue.gpas(), u64::from(queue.size()));
        (desc..desc + 16 * size).contains(&gpa) || (avail..avail + 6 + 2 * size).contains(&gpa)
    })
}
