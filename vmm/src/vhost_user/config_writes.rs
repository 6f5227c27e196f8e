//! What a driver wrote to a device's configuration space, for a backend that has not seen it.

/// Writes in their order, as wide as they were made: a backend gets each as one message. Those that a later one
/// covers are dropped, so there are never more than ways to access the space.
#[derive(Debug, Default)]
pub(super) struct ConfigWrites(Vec<(usize, Vec<u8>)>);

impl ConfigWrites {
    /// One more.
    pub(super) fn push(&mut self, offset: usize, data: Vec<u8>) {
        let end = offset + data.len();
        self.0
            .retain(|(at, old)| *at < offset || at + old.len() > end);
        self.0.push((offset, data));
    }

    /// None any more.
    pub(super) fn clear(&mut self) {
        self.0.clear();
    }

    /// The oldest first.
    pub(super) fn iter(&self) -> impl Iterator<Item = (usize, &[u8])> {
        self.0.iter().map(|(offset, data)| (*offset, &data[..]))
    }
}

impl IntoIterator for ConfigWrites {
    type Item = (usize, Vec<u8>);
    type IntoIter = std::vec::IntoIter<Self::Item>;

    fn into_iter(self) -> Self::IntoIter {
        self.0.into_iter()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a space of eight bytes is after all of them.
    fn applied(writes: ConfigWrites) -> [u8; 8] {
        let mut space = [0; 8];
        for (offset, data) in writes {
            space[offset..offset + data.len()].copy_from_slice(&data);
        }
        space
    }

    #[test]
    fn a_narrow_write_leaves_the_rest_of_a_wide_one() {
        let mut writes = ConfigWrites::default();
        writes.push(0, vec![1, 2, 3, 4]);
        writes.push(0, vec![9]);
        assert_eq!(applied(writes), [9, 2, 3, 4, 0, 0, 0, 0]);
    }

    #[test]
    fn a_wide_write_that_comes_later_wins() {
        let mut writes = ConfigWrites::default();
        writes.push(2, vec![9, 9]);
        writes.push(0, vec![1, 2, 3, 4]);
        writes.push(4, vec![5]);
        assert_eq!(writes.iter().count(), 2, "one is covered");
        assert_eq!(applied(writes), [1, 2, 3, 4, 5, 0, 0, 0]);
    }

    #[test]
    fn writes_without_end_are_a_few() {
        let mut writes = ConfigWrites::default();
        for round in 0..1000 {
            for (offset, len) in [(0, 4), (2, 2), (0, 1), (4, 2), (5, 1)] {
                writes.push(offset, vec![round as u8; len]);
            }
        }
        assert!(writes.iter().count() <= 5);
    }
}
