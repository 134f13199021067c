//! Charts: bars as HTML, which keep their text readable at any width, and lines as inline SVG. Colours are the style sheet's,
//! so that they follow light and dark.

use std::fmt::Write;

use super::html::{escape, small};

/// One bar.
pub(super) struct Bar {
    /// What it is of.
    pub(super) label: String,
    /// Its length, in the chart's unit. A negative one is drawn as long, in the colour of costs.
    pub(super) value: f64,
    /// The value as it is shown.
    pub(super) shown: String,
    /// Class of its colour.
    pub(super) colour: &'static str,
}

/// Horizontal bars, all measured by the longest, or by `full` where it is given.
pub(super) fn bars(bars: &[Bar], full: Option<f64>) -> String {
    let longest = bars.iter().map(|bar| bar.value.abs()).fold(0.0, f64::max);
    let full = full.unwrap_or(longest).max(f64::MIN_POSITIVE);
    let mut html = String::from("<div class=\"bars\">\n");
    for Bar { label, value, shown, colour } in bars {
        let width = (100.0 * value.abs() / full).clamp(0.0, 100.0);
        let colour = if *value < 0.0 { "cost" } else { colour };
        writeln!(
            html,
            "<div class=\"bar\"><span class=\"label\">{}</span><span class=\"track\"><span class=\"fill {colour}\" \
             style=\"width:{width:.2}%\"></span></span><span class=\"value\" data-value=\"{value}\">{}</span></div>",
            escape(label),
            escape(shown)
        )
        .expect("a String takes all that is written to it");
    }
    html.push_str("</div>\n");
    html
}

/// What the colours stand for.
pub(super) fn legend(entries: &[(&str, &str)]) -> String {
    let entries: String = (entries.iter())
        .map(|(colour, name)| format!("<span><i class=\"swatch {colour}\"></i>{}</span>", escape(name)))
        .collect();
    format!("<div class=\"legend\">{entries}</div>\n")
}

/// One line.
pub(super) struct Line {
    /// What it is of.
    pub(super) name: String,
    /// Class of its colour.
    pub(super) colour: &'static str,
    /// Its points, from left to right.
    pub(super) points: Vec<(f64, f64)>,
    /// Whether its points are marked.
    pub(super) has_marks: bool,
}

/// What a chart measures.
pub(super) struct Axes<'a> {
    /// Below the chart.
    pub(super) x: &'a str,
    /// Above it.
    pub(super) y: &'a str,
    /// Whether heights are powers of ten; what is not above zero is left out then.
    pub(super) is_logarithmic: bool,
}

/// Size of a drawing.
const WIDTH: f64 = 640.0;
const HEIGHT: f64 = 260.0;
/// Room around its plot.
const LEFT: f64 = 58.0;
const RIGHT: f64 = 14.0;
const TOP: f64 = 26.0;
const BOTTOM: f64 = 40.0;

/// A line chart; nothing where there is nothing to draw.
pub(super) fn lines(axes: &Axes<'_>, lines: &[Line]) -> String {
    let drawable =
        |point: &&(f64, f64)| point.0.is_finite() && point.1.is_finite() && (!axes.is_logarithmic || point.1 > 0.0);
    let all: Vec<(f64, f64)> = lines.iter().flat_map(|line| line.points.iter().filter(drawable)).copied().collect();
    if all.is_empty() {
        return String::new();
    }
    let x_range = widened(all.iter().map(|point| point.0));
    let (y_ticks, y_range) = match axes.is_logarithmic {
        true => logarithmic_ticks(all.iter().map(|point| point.1)),
        false => {
            let (low, high) = widened(all.iter().map(|point| point.1).chain([0.0]));
            let ticks = linear_ticks(low, high);
            (ticks, (low, high))
        }
    };
    let x_of = |x: f64| LEFT + (WIDTH - LEFT - RIGHT) * (x - x_range.0) / (x_range.1 - x_range.0);
    let y_of = |y: f64| {
        let (y, low, high) = match axes.is_logarithmic {
            true => (y.log10(), y_range.0.log10(), y_range.1.log10()),
            false => (y, y_range.0, y_range.1),
        };
        HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (y - low) / (high - low)
    };
    let mut svg = format!(
        "<div class=\"scroll\"><svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" aria-label=\"{} by {}\">\n",
        escape(axes.y),
        escape(axes.x)
    );
    let mut add = |text: String| svg.push_str(&text);
    add(format!("<text class=\"axis\" x=\"0\" y=\"12\">{}</text>\n", escape(axes.y)));
    let (middle, below) = (LEFT + (WIDTH - LEFT - RIGHT) / 2.0, HEIGHT - 6.0);
    add(format!(
        "<text class=\"axis\" x=\"{middle}\" y=\"{below}\" text-anchor=\"middle\">{}</text>\n",
        escape(axes.x)
    ));
    for tick in y_ticks {
        let (y, right) = (y_of(tick), WIDTH - RIGHT);
        add(format!("<line class=\"grid\" x1=\"{LEFT}\" x2=\"{right}\" y1=\"{y:.1}\" y2=\"{y:.1}\"/>"));
        add(format!(
            "<text class=\"tick\" x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>\n",
            LEFT - 6.0,
            y + 4.0,
            tick_label(tick)
        ));
    }
    for tick in linear_ticks(x_range.0, x_range.1) {
        let (x, y) = (x_of(tick), HEIGHT - BOTTOM + 16.0);
        add(format!(
            "<text class=\"tick\" x=\"{x:.1}\" y=\"{y}\" text-anchor=\"middle\">{}</text>\n",
            tick_label(tick)
        ));
    }
    for Line { name, colour, points, has_marks } in lines {
        let points: Vec<&(f64, f64)> = points.iter().filter(drawable).collect();
        let path: Vec<String> =
            points.iter().map(|point| format!("{:.1},{:.1}", x_of(point.0), y_of(point.1))).collect();
        add(format!("<polyline class=\"line {colour}\" points=\"{}\"/>\n", path.join(" ")));
        for &&(x, y) in points.iter().filter(|_| *has_marks) {
            add(format!(
                "<circle class=\"mark {colour}\" cx=\"{:.1}\" cy=\"{:.1}\" r=\"4\"><title>{}: {} at {}</title></circle>\n",
                x_of(x),
                y_of(y),
                escape(name),
                small(y),
                small(x)
            ));
        }
    }
    add("</svg></div>\n".into());
    let names: Vec<(&str, &str)> = lines.iter().map(|line| (line.colour, line.name.as_str())).collect();
    legend(&names) + &svg
}

/// The range of the values, made wider where they are all the same.
fn widened(values: impl Iterator<Item = f64>) -> (f64, f64) {
    let (low, high) =
        values.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), value| (low.min(value), high.max(value)));
    if low < high { (low, high) } else { (low - 0.5, high + 0.5) }
}

/// About five round numbers in the range.
fn linear_ticks(low: f64, high: f64) -> Vec<f64> {
    let raw = (high - low) / 5.0;
    let decade = 10_f64.powf(raw.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].into_iter().map(|factor| factor * decade).find(|&step| step >= raw).unwrap_or(raw);
    let (first, last) = ((low / step - 1e-9).ceil() as i64, (high / step + 1e-9).floor() as i64);
    (first..=last).map(|tick| tick as f64 * step).collect()
}

/// Powers of ten around the values, at most six, and the range that they span.
fn logarithmic_ticks(values: impl Iterator<Item = f64> + Clone) -> (Vec<f64>, (f64, f64)) {
    let (low, high) = widened(values.map(f64::log10));
    let (low, high) = ((low + 1e-9).floor() as i32, (high - 1e-9).ceil() as i32);
    let every = ((high - low) as usize).div_ceil(6).max(1);
    let ticks = (low..=high).step_by(every).map(|power| 10_f64.powi(power)).collect();
    (ticks, (10_f64.powi(low), 10_f64.powi(high)))
}

fn tick_label(tick: f64) -> String {
    let rounded = format!("{tick:.6}");
    let plain = rounded.trim_end_matches('0').trim_end_matches('.');
    if tick != 0.0 && !(0.001..10_000.0).contains(&tick.abs()) { format!("{tick:e}") } else { plain.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_within_their_range() {
        assert_eq!(
            linear_ticks(0.0, 1.0).iter().map(|&tick| tick_label(tick)).collect::<Vec<_>>(),
            ["0", "0.2", "0.4", "0.6", "0.8", "1"]
        );
        assert_eq!(linear_ticks(2.1, 8.3), [4.0, 6.0, 8.0]);
        let (ticks, range) = logarithmic_ticks([2e-4, 0.03].into_iter());
        assert_eq!(ticks.iter().map(|&tick| tick_label(tick)).collect::<Vec<_>>(), ["1e-4", "0.001", "0.01", "0.1"]);
        assert!((range.0 - 1e-4).abs() < 1e-12 && (range.1 - 0.1).abs() < 1e-12);
    }

    #[test]
    fn what_cannot_be_drawn_is_left_out() {
        let axes = Axes { x: "x", y: "y", is_logarithmic: true };
        let line =
            |points: &[(f64, f64)]| Line { name: "l".into(), colour: "s1", points: points.to_vec(), has_marks: true };
        assert_eq!(lines(&axes, &[line(&[(1.0, 0.0), (2.0, f64::NAN)])]), "");
        let drawn = lines(&axes, &[line(&[(1.0, 0.0), (2.0, 1e-3)])]);
        assert_eq!(drawn.matches("<circle").count(), 1);
        assert!(!drawn.contains("NaN") && !drawn.contains("inf"), "{drawn}");
    }

    #[test]
    fn bars_are_measured_by_the_longest() {
        let bar = |value| Bar { label: "<b>".into(), value, shown: "v".into(), colour: "s1" };
        let html = bars(&[bar(2.0), bar(-4.0)], None);
        assert!(html.contains("width:50.00%") && html.contains("fill cost\" style=\"width:100.00%"), "{html}");
        assert!(html.contains("&lt;b&gt;"));
    }
}
