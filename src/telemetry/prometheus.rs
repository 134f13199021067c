//! The metrics in Prometheus' text format, version 0.0.4.

use std::fmt::Write;

use crate::metrics::{METRICS, Metric, Unit, Value};

/// All metrics of the process.
pub(super) fn text() -> String {
    METRICS.all().iter().fold(String::new(), |mut text, metric| {
        write_metric(&mut text, metric).expect("a String takes all that is written to it");
        text
    })
}

fn write_metric(text: &mut String, metric: &Metric) -> std::fmt::Result {
    let Metric { name, help, unit, value } = metric;
    writeln!(text, "# HELP {name} {help}")?;
    match value {
        Value::Counter(number) => writeln!(text, "# TYPE {name} counter\n{name} {}", in_unit(*number, *unit)),
        Value::Gauge(number) => writeln!(text, "# TYPE {name} gauge\n{name} {}", in_unit(*number, *unit)),
        Value::Histogram(times) => {
            writeln!(text, "# TYPE {name} histogram")?;
            for (bound, count) in &times.buckets {
                writeln!(text, "{name}_bucket{{le=\"{}\"}} {count}", bound.as_secs_f64())?;
            }
            writeln!(text, "{name}_bucket{{le=\"+Inf\"}} {}", times.count)?;
            writeln!(text, "{name}_sum {}\n{name}_count {}", times.sum.as_secs_f64(), times.count)
        }
    }
}

/// Times are kept in nanoseconds.
fn in_unit(number: u64, unit: Unit) -> String {
    match unit {
        Unit::Count | Unit::Bytes => number.to_string(),
        Unit::Seconds => (number as f64 / 1e9).to_string(),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::metrics::HistogramSnapshot;

    #[test]
    fn each_kind_is_written_as_prometheus_reads_it() {
        let mut text = String::new();
        let mut write =
            |name, unit, value| write_metric(&mut text, &Metric { name, help: "Help.", unit, value }).unwrap();
        write("a_total", Unit::Count, Value::Counter(3));
        write("b_seconds", Unit::Seconds, Value::Gauge(1_500_000_000));
        let buckets = vec![(Duration::from_millis(1), 2)];
        let times = HistogramSnapshot { buckets, count: 3, sum: Duration::from_millis(250) };
        write("c_seconds", Unit::Seconds, Value::Histogram(times));
        let expected = [
            "# HELP a_total Help.\n# TYPE a_total counter\na_total 3\n",
            "# HELP b_seconds Help.\n# TYPE b_seconds gauge\nb_seconds 1.5\n",
            "# HELP c_seconds Help.\n# TYPE c_seconds histogram\nc_seconds_bucket{le=\"0.001\"} 2\n",
            "c_seconds_bucket{le=\"+Inf\"} 3\nc_seconds_sum 0.25\nc_seconds_count 3\n",
        ];
        assert_eq!(text, expected.concat());
    }
}
