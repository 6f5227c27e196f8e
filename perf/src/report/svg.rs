//! Pictures as inline SVG: bars with spread, distributions, timelines. 360 units wide, so that on a phone a unit is
//! about a pixel and letters are as large as the text around.
#![forbid(unsafe_code)]

use std::fmt::Write;

use super::page::escape;
use super::table::amount;
use crate::engine::short;
use crate::results::Role;
use crate::stats::Spread;

/// Width of every picture.
const WIDTH: f64 = 360.0;
/// One bar with its name.
const ROW: f64 = 36.0;
/// Colours of lines, in order; the first is ours. CSS has them.
const COLOURS: usize = 8;

/// One bar.
pub(super) struct Bar {
    pub(super) name: String,
    pub(super) role: Role,
    pub(super) spread: Spread,
    /// Behind the number.
    pub(super) extra: String,
}

/// Class of a role's bars.
fn class(role: Role) -> &'static str {
    match role {
        Role::Limit => "limit",
        Role::Variant => "variant",
        Role::Ours => "ours",
        Role::Peer => "peer",
    }
}

/// Bars from 0 with a line from the smallest to the largest round.
pub(super) fn bars(bars: &[Bar], unit: &str) -> String {
    let largest = bars.iter().map(|bar| bar.spread.max).fold(0.0, f64::max);
    let scale = |number: f64| {
        let share = if largest > 0.0 { number / largest } else { 0.0 };
        share.clamp(0.0, 1.0) * (WIDTH - 4.0)
    };
    let height = ROW * bars.len() as f64 + 4.0;
    let mut out = open(height, "bars with spread");
    for (index, bar) in bars.iter().enumerate() {
        let top = index as f64 * ROW;
        let (text, y) = (top + 14.0, top + 19.0);
        let middle = y + 6.0;
        let [low, median, high] = [bar.spread.min, bar.spread.median, bar.spread.max].map(scale);
        let _ = write!(
            out,
            "<text x=\"0\" y=\"{text}\" class=\"name {class}\">{name}</text>\
             <text x=\"{WIDTH}\" y=\"{text}\" text-anchor=\"end\">{number} {unit}{extra}</text>\
             <rect x=\"0\" y=\"{y}\" width=\"{median:.1}\" height=\"12\" rx=\"2\" class=\"bar {class}\"/>\
             <path d=\"M{low:.1} {middle}H{high:.1}M{low:.1} {cap}v8M{high:.1} {cap}v8\" class=\"whisker\"/>",
            class = class(bar.role),
            name = escape(&bar.name),
            number = amount(bar.spread.median),
            unit = escape(unit),
            extra = escape(&bar.extra),
            cap = middle - 4.0,
        );
    }
    out.push_str("</svg>");
    out
}

/// One line.
pub(super) struct Line {
    pub(super) name: String,
    /// Of [`COLOURS`], then the same dashed.
    pub(super) colour: usize,
    pub(super) points: Vec<[f64; 2]>,
}

impl Line {
    /// Of its path, and of its mark in the legend.
    pub(super) fn class(&self) -> String {
        let dashed = if self.colour >= COLOURS {
            " dashed"
        } else {
            ""
        };
        format!("c{}{dashed}", self.colour % COLOURS)
    }
}

/// How a picture of lines is scaled.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Axis {
    /// Shares of requests by their nines, latencies by powers of ten.
    Distribution,
    /// Seconds, and a value from 0.
    Time,
}

const LEFT: f64 = 44.0;
const TOP: f64 = 8.0;
const BOTTOM: f64 = 182.0;
const RIGHT: f64 = WIDTH - 8.0;
/// Where 99.99 % are; what is above is cut.
const NINES: f64 = 4.0;

/// Lines with axes; the legend is below, in HTML.
pub(super) fn lines(lines: &[Line], axis: Axis, unit: &str) -> String {
    let points: Vec<[f64; 2]> = lines
        .iter()
        .flat_map(|line| &line.points)
        .map(|point| placed(*point, axis))
        .collect();
    let range = |index: usize| {
        let numbers = points
            .iter()
            .map(|point| point[index])
            .filter(|number| number.is_finite());
        numbers.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), number| {
            (low.min(number), high.max(number))
        })
    };
    let (from, to) = match axis {
        Axis::Distribution => ((0.0, NINES), widened(range(1))),
        Axis::Time => ((0.0, range(0).1.max(1e-9)), (0.0, range(1).1.max(1e-9))),
    };
    let x = |number: f64| LEFT + (number - from.0) / (from.1 - from.0) * (RIGHT - LEFT);
    let y = |number: f64| BOTTOM - (number - to.0) / (to.1 - to.0) * (BOTTOM - TOP);
    let mut out = open(206.0, "lines");
    let (across, up) = ticks(axis, from, to);
    for (at, label) in across {
        let at = x(at);
        let _ = write!(
            out,
            "<path d=\"M{at:.1} {TOP}V{BOTTOM}\" class=\"grid\"/><text x=\"{at:.1}\" y=\"197\" text-anchor=\"middle\" class=\"tick\">{label}</text>"
        );
    }
    for (at, label) in up {
        let at = y(at);
        let _ = write!(
            out,
            "<path d=\"M{LEFT} {at:.1}H{RIGHT}\" class=\"grid\"/><text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\" class=\"tick\">{label}</text>",
            LEFT - 4.0,
            at + 4.0
        );
    }
    for line in lines {
        let placed = line.points.iter().map(|point| placed(*point, axis));
        let path: Vec<String> = placed
            .filter(|point| point[0] <= from.1 && point.iter().all(|number| number.is_finite()))
            .map(|point| format!("{:.1} {:.1}", x(point[0]), y(point[1])))
            .collect();
        if !path.is_empty() {
            let _ = write!(
                out,
                "<path d=\"M{}\" class=\"line {}\"/>",
                path.join("L"),
                line.class()
            );
        }
    }
    let _ = write!(
        out,
        "<text x=\"0\" y=\"197\" class=\"tick\">{}</text></svg>",
        escape(unit)
    );
    out
}

/// Whole powers of ten around a range of exponents.
fn widened((low, high): (f64, f64)) -> (f64, f64) {
    if !low.is_finite() || !high.is_finite() {
        return (0.0, 1.0);
    }
    let (low, high) = (low.floor(), high.ceil());
    (low, if high > low { high } else { low + 1.0 })
}

fn placed([x, y]: [f64; 2], axis: Axis) -> [f64; 2] {
    match axis {
        Axis::Distribution => [-(1.0 - x).log10(), y.log10()],
        Axis::Time => [x, y],
    }
}

/// As short as the margin is narrow: 100, 10k, 1M.
fn axis_label(number: f64) -> String {
    let (number, unit) = match number.abs() {
        1e9.. => (number / 1e9, "G"),
        1e6.. => (number / 1e6, "M"),
        1e4.. => (number / 1e3, "k"),
        _ => (number, ""),
    };
    let digits = short(number);
    let digits = match digits.split_once('.') {
        Some(_) => digits.trim_end_matches('0').trim_end_matches('.'),
        None => &digits,
    };
    format!("{digits}{unit}")
}

type Ticks = Vec<(f64, String)>;

fn ticks(axis: Axis, from: (f64, f64), to: (f64, f64)) -> (Ticks, Ticks) {
    let even = |(low, high): (f64, f64)| -> Ticks {
        let at = |part: u32| low + (high - low) * f64::from(part) / 4.0;
        (0..=4)
            .map(|part| (at(part), axis_label(at(part))))
            .collect()
    };
    if axis == Axis::Time {
        return (even(from), even(to));
    }
    let shares = [
        (0.0, "0"),
        (0.5, "50"),
        (0.9, "90"),
        (0.99, "99"),
        (0.999, "99.9"),
        (0.9999, "99.99 %"),
    ];
    let across =
        shares.map(|(share, label): (f64, &str)| (-(1.0 - share).log10(), label.to_owned()));
    let powers = to.0 as i32..=to.1 as i32;
    let up = powers.map(|power| (f64::from(power), axis_label(10f64.powi(power))));
    (across.to_vec(), up.collect())
}

fn open(height: f64, label: &str) -> String {
    format!("<svg viewBox=\"0 0 {WIDTH} {height}\" role=\"img\" aria-label=\"{label}\">")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_bar_fills_the_picture_and_names_are_escaped() {
        let bar = |name: &str, number: f64| Bar {
            name: name.to_owned(),
            role: Role::Ours,
            spread: Spread::of([number]).unwrap(),
            extra: String::new(),
        };
        let text = bars(&[bar("a<b", 50.0), bar("c", 100.0)], "1/s");
        assert!(
            text.contains("width=\"178.0\"") && text.contains("width=\"356.0\""),
            "{text}"
        );
        assert!(text.contains("a&lt;b") && !text.contains("NaN"), "{text}");
        assert!(!bars(&[bar("nothing", 0.0)], "").contains("NaN"));
    }

    #[test]
    fn labels_fit_the_margin() {
        let labels = [0.0, 1.0, 2500.0, 10_000.0, 1_000_000.0, 2.5e9].map(axis_label);
        assert_eq!(labels, ["0", "1", "2500", "10k", "1M", "2.5G"]);
    }

    #[test]
    fn a_distribution_has_its_nines_and_powers_of_ten() {
        let line = Line {
            name: String::new(),
            colour: 0,
            points: vec![[0.0, 0.0], [0.5, 12.0], [0.99, 80.0], [1.0, 900.0]],
        };
        let text = lines(&[line], Axis::Distribution, "µs");
        assert!(
            text.contains(">99.9<") && text.contains(">10<") && text.contains(">100<"),
            "{text}"
        );
        // A latency of 0 and the share 1 are at no place on these scales.
        assert!(!text.contains("NaN") && !text.contains("inf"), "{text}");
        assert!(!lines(&[], Axis::Time, "s").contains("NaN"));
    }
}
