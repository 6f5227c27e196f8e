//! What N guests take, beyond the N that were started: a straight line through what was measured, and no more than
//! that. It knows nothing of limits that none of the measured points has met.
#![forbid(unsafe_code)]

/// `base + each · N`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Line {
    pub(super) base: f64,
    pub(super) each: f64,
    /// Largest distance of a point from it, as a share of the point.
    pub(super) off: f64,
}

impl Line {
    /// By least squares; none of fewer than two different numbers of guests.
    pub(super) fn through(points: &[(f64, f64)]) -> Option<Line> {
        let count = points.len() as f64;
        let mean = |of: fn(&(f64, f64)) -> f64| points.iter().map(of).sum::<f64>() / count;
        let (mean_n, mean_mib) = (mean(|point| point.0), mean(|point| point.1));
        let spread: f64 = points.iter().map(|(n, _)| (n - mean_n).powi(2)).sum();
        if points.is_empty() || spread == 0.0 {
            return None;
        }
        let with: f64 = points
            .iter()
            .map(|(n, mib)| (n - mean_n) * (mib - mean_mib))
            .sum();
        let each = with / spread;
        let base = mean_mib - each * mean_n;
        let off = points
            .iter()
            .map(|(n, mib)| ((base + each * n - mib) / mib).abs())
            .fold(0.0, f64::max);
        Some(Line { base, each, off })
    }

    /// In words, for a host with so much memory left.
    pub(super) fn words(&self, available_mib: f64) -> String {
        let Line { base, each, off } = self;
        let guests = ((available_mib - base) / each).floor().max(0.0);
        let off = off * 100.0;
        format!(
            "model, extrapolated: {base:.1} + {each:.2} N MiB for N guests that touch as little as these (off by at most {off:.0} % \
             where measured); {available_mib:.0} MiB would do for {guests:.0}, by that alone"
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_goes_through_points_on_it_and_says_how_far_off_others_are() {
        let line = Line::through(&[(1.0, 12.0), (4.0, 18.0), (16.0, 42.0)]).unwrap();
        assert!((line.base - 10.0).abs() < 1e-9 && (line.each - 2.0).abs() < 1e-9);
        assert!(line.off < 1e-9);
        assert!(
            line.words(110.0).contains("for 50,"),
            "{}",
            line.words(110.0)
        );
        let bent = Line::through(&[(1.0, 12.0), (4.0, 18.0), (16.0, 80.0)]).unwrap();
        assert!(bent.off > 0.05);
        assert_eq!(Line::through(&[(4.0, 1.0), (4.0, 2.0)]), None);
        assert_eq!(Line::through(&[]), None);
    }
}
