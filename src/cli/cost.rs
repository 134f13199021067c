//! When packing pays (the paper's Appendix J): load times at a bandwidth, the bandwidth and the number of loads at which the
//! archive breaks even. `bench` and `inspect --cost` print it, the report shows it.

use std::fmt;

use serde::Serialize;

/// Load times at a bandwidth (Eqs. 109-110), and the bandwidths at which both ways take equally long: where Eq. 115 is 0,
/// serially, and where the transfer of the original takes as long as decoding alone, overlapped. Making weights of the
/// original's bytes is taken to cost nothing, as where they are mapped, so the break-even is the least that can be claimed.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Loading {
    /// Bytes per second that files arrive with (B).
    pub bandwidth: u64,
    /// The original's bytes fetched.
    pub original_seconds: f64,
    /// The archive fetched, then decoded.
    pub serial_seconds: f64,
    /// The archive decoded while it is fetched.
    pub overlapped_seconds: f64,
    /// Below so many bytes per second the archive loads faster, serially.
    pub serial_break_even: f64,
    /// The same where decoding overlaps.
    pub overlapped_break_even: f64,
    /// What packing costs, where it was said.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub packing: Option<Packing>,
}

/// After how many loads the seconds of packing are saved (Eq. 113), having the original for nothing; `None` where loads save
/// none.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Packing {
    /// Seconds that packing takes.
    pub encode_seconds: f64,
    /// Loads, where the archive is fetched and then decoded.
    pub serial_break_even_loads: Option<u64>,
    /// Loads, where it is decoded while it is fetched.
    pub overlapped_break_even_loads: Option<u64>,
}

impl Loading {
    /// From what was measured: `original_bytes` and `stored_bytes` of the two files, and the seconds to decode and, once, to
    /// pack.
    pub fn new(
        bandwidth: u64,
        original_bytes: u64,
        stored_bytes: u64,
        decode_seconds: f64,
        encode_seconds: Option<f64>,
    ) -> Self {
        let [original, stored] = [original_bytes, stored_bytes].map(|bytes| bytes as f64);
        let fetch = stored / bandwidth as f64;
        let original_seconds = original / bandwidth as f64;
        let (serial_seconds, overlapped_seconds) = (fetch + decode_seconds, fetch.max(decode_seconds));
        let packing = encode_seconds.map(|encode_seconds| {
            let loads = |seconds: f64| {
                let saved = original_seconds - seconds;
                (saved > 0.0).then(|| (encode_seconds / saved).ceil() as u64)
            };
            Packing {
                encode_seconds,
                serial_break_even_loads: loads(serial_seconds),
                overlapped_break_even_loads: loads(overlapped_seconds),
            }
        });
        Self {
            bandwidth,
            original_seconds,
            serial_seconds,
            overlapped_seconds,
            packing,
            serial_break_even: (original - stored).max(0.0) / decode_seconds,
            overlapped_break_even: if stored < original { original / decode_seconds } else { 0.0 },
        }
    }
}

impl fmt::Display for Loading {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            out,
            "at {:.3} GB/s: the original loads in {:.3} s, the archive in {:.3} s, or {:.3} s decoded while it arrives",
            self.bandwidth as f64 / 1e9,
            self.original_seconds,
            self.serial_seconds,
            self.overlapped_seconds,
        )?;
        writeln!(
            out,
            "the archive loads faster below {:.3} GB/s, or below {:.3} GB/s decoded while it arrives",
            self.serial_break_even / 1e9,
            self.overlapped_break_even / 1e9,
        )?;
        let Some(packing) = self.packing else { return Ok(()) };
        let [serial, overlapped] = [packing.serial_break_even_loads, packing.overlapped_break_even_loads].map(loads);
        writeln!(
            out,
            "{:.3} s of packing are made up for {serial}, or {overlapped} decoded while it arrives",
            packing.encode_seconds,
        )
    }
}

/// A number of loads in words.
fn loads(loads: Option<u64>) -> String {
    match loads {
        None => "never".into(),
        Some(1) => "after 1 load".into(),
        Some(loads) => format!("after {loads} loads"),
    }
}

/// Reads seconds as they are given on the command line.
///
/// # Errors
/// A message that says what was expected.
pub fn parse_seconds(text: &str) -> Result<f64, String> {
    let seconds = text.parse().ok().filter(|seconds: &f64| seconds.is_finite() && *seconds >= 0.0);
    seconds.ok_or_else(|| "expected a number of seconds, 0 or more".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn at_the_break_even_bandwidth_both_ways_take_equally_long() {
        let at = |bandwidth| Loading::new(bandwidth, 10_000, 4_000, 0.5, None);
        let serial = at(at(1).serial_break_even as u64);
        assert!((serial.original_seconds - serial.serial_seconds).abs() < 1e-9);
        let overlapped = at(at(1).overlapped_break_even as u64);
        assert!((overlapped.original_seconds - overlapped.overlapped_seconds).abs() < 1e-9);
    }

    #[test]
    fn an_archive_larger_than_the_original_never_loads_faster() {
        let loading = Loading::new(1, 100, 101, 0.5, Some(1.0));
        assert_eq!((loading.serial_break_even, loading.overlapped_break_even), (0.0, 0.0));
        let Packing { serial_break_even_loads, overlapped_break_even_loads, .. } = loading.packing.expect("asked for");
        assert_eq!((serial_break_even_loads, overlapped_break_even_loads), (None, None));
    }

    /// With the figures of the paper's Table 12, second line: it says about 400 loads.
    #[test]
    fn packing_pays_off_when_the_loads_have_saved_its_seconds() {
        let of = |encode_seconds| {
            let loading = Loading::new(100_000_000, 2_800_000_000, 740_000_000, 2.5, Some(encode_seconds));
            loading.packing.expect("asked for")
        };
        let loads = of(2.3 * 3600.0);
        assert_eq!(loads.serial_break_even_loads, Some(458), "8280 s, of which a load saves 28 - 7.4 - 2.5");
        assert_eq!(loads.overlapped_break_even_loads, Some(402), "a load saves 28 - 7.4");
        assert_eq!((of(0.0).serial_break_even_loads, of(18.0).serial_break_even_loads), (Some(0), Some(1)));
    }

    #[test]
    fn seconds_are_a_number_that_is_not_negative() {
        assert_eq!(parse_seconds("2.5"), Ok(2.5));
        for wrong in ["", "-1", "inf", "nan", "2 s"] {
            assert!(parse_seconds(wrong).is_err(), "{wrong}");
        }
    }
}
