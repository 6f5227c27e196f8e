//! Middle and spread of some numbers.
#![forbid(unsafe_code)]

use serde::{Deserialize, Serialize};

/// What a handful of repetitions comes to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Spread {
    /// Smallest.
    pub min: f64,
    /// A quarter is below.
    pub low: f64,
    /// Middle; of an even number the mean of the two middle ones.
    pub median: f64,
    /// A quarter is above.
    pub high: f64,
    /// Largest.
    pub max: f64,
}

impl Spread {
    /// None without numbers.
    pub fn of(numbers: impl IntoIterator<Item = f64>) -> Option<Spread> {
        let mut sorted: Vec<f64> = numbers.into_iter().collect();
        sorted.sort_by(f64::total_cmp);
        Some(Spread {
            min: *sorted.first()?,
            low: quantile(&sorted, 0.25),
            median: quantile(&sorted, 0.5),
            high: quantile(&sorted, 0.75),
            max: *sorted.last()?,
        })
    }

    /// Width of the middle half as a share of the median; 0 for a median of 0.
    pub fn width(&self) -> f64 {
        if self.median == 0.0 {
            return 0.0;
        }
        ((self.high - self.low) / self.median).abs()
    }
}

/// Of sorted numbers, between two of them in proportion.
fn quantile(sorted: &[f64], share: f64) -> f64 {
    let at = share * (sorted.len() - 1) as f64;
    let (below, part) = (at.floor() as usize, at.fract());
    let above = (below + 1).min(sorted.len() - 1);
    sorted[below] + (sorted[above] - sorted[below]) * part
}

/// Mean and standard deviation (of the population, as in Cloud Hypervisor's report).
pub fn mean_and_deviation(numbers: &[f64]) -> (f64, f64) {
    let count = numbers.len().max(1) as f64;
    let mean = numbers.iter().sum::<f64>() / count;
    let squares = numbers.iter().map(|number| (number - mean).powi(2));
    (mean, (squares.sum::<f64>() / count).sqrt())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_middle_is_the_middle_and_quarters_lie_between() {
        let spread = Spread::of([4.0, 1.0, 2.0, 3.0]).unwrap();
        assert_eq!((spread.min, spread.median, spread.max), (1.0, 2.5, 4.0));
        assert_eq!((spread.low, spread.high), (1.75, 3.25));
        assert!((spread.width() - 0.6).abs() < 1e-9);
        assert_eq!(Spread::of([7.0]).unwrap().high, 7.0);
        assert_eq!(Spread::of([]), None);
    }

    #[test]
    fn deviation_is_that_of_the_population() {
        let (mean, deviation) = mean_and_deviation(&[2.0, 4.0, 4.0, 4.0, 5.0, 5.0, 7.0, 9.0]);
        assert_eq!((mean, deviation), (5.0, 2.0));
        assert_eq!(mean_and_deviation(&[3.0]), (3.0, 0.0));
    }
}
