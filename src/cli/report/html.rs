//! Pieces of HTML. Whatever text goes into them is escaped here and nowhere else; a number that is shown carries its exact
//! value, so that a program finds on the page what it finds in the JSON.

use std::fmt::Write;

/// Text as it can stand in HTML, attributes included.
pub(super) fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            control if control.is_control() && control != '\n' => {
                write!(escaped, "{}", control.escape_default()).expect("a String takes all that is written to it");
            }
            other => escaped.push(other),
        }
    }
    escaped
}

/// What stands in a cell.
pub(super) enum Cell {
    /// Words, not yet escaped.
    Text(String),
    /// Something literal, as names of tensors are, not yet escaped.
    Code(String),
    /// A number: as it is, and as it is shown.
    Number(f64, String),
    /// Nothing is known.
    Absent,
}

impl Cell {
    /// A whole number with its digits in groups.
    pub(super) fn count(count: u64) -> Self {
        Self::Number(count as f64, grouped(count))
    }

    /// A number with so many decimals.
    pub(super) fn decimals(value: f64, decimals: usize) -> Self {
        Self::Number(value, format!("{value:.decimals$}"))
    }

    /// A number that may be very small.
    pub(super) fn small(value: f64) -> Self {
        Self::Number(value, small(value))
    }

    /// The same where it is known.
    pub(super) fn small_or_absent(value: Option<f64>) -> Self {
        value.map_or(Self::Absent, Self::small)
    }
}

/// 1234567 as 1,234,567.
pub(super) fn grouped(count: u64) -> String {
    let digits = count.to_string();
    let mut text = String::with_capacity(digits.len() * 4 / 3);
    for (position, digit) in digits.chars().enumerate() {
        if position > 0 && (digits.len() - position).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// A number with three digits that count, in powers of ten where it is far from one.
pub(super) fn small(value: f64) -> String {
    if value == 0.0 {
        "0".into()
    } else if (0.01..1000.0).contains(&value.abs()) {
        format!("{value:.*}", (2 - value.abs().log10().floor() as i32).max(0) as usize)
    } else {
        format!("{value:.2e}")
    }
}

/// Bytes in the unit that suits them.
pub(super) fn bytes(bytes: u64) -> String {
    let value = bytes as f64;
    match bytes {
        0..1_000 => format!("{bytes} B"),
        1_000..1_000_000 => format!("{:.1} kB", value / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1} MB", value / 1e6),
        _ => format!("{:.2} GB", value / 1e9),
    }
}

/// A table: headings, and rows of as many cells.
pub(super) fn table(headings: &[&str], rows: impl IntoIterator<Item = Vec<Cell>>) -> String {
    let mut body = String::new();
    let mut is_number = vec![false; headings.len()];
    for row in rows {
        body.push_str("<tr>");
        for (column, cell) in row.iter().enumerate() {
            let html = match cell {
                Cell::Text(text) => format!("<td>{}</td>", escape(text)),
                Cell::Code(text) => format!("<td><code>{}</code></td>", escape(text)),
                Cell::Number(value, shown) => {
                    is_number[column] = true;
                    format!("<td class=\"number\" data-value=\"{value}\">{}</td>", escape(shown))
                }
                Cell::Absent => "<td class=\"number absent\">–</td>".into(),
            };
            body.push_str(&html);
        }
        body.push_str("</tr>\n");
    }
    let heads: String = headings
        .iter()
        .zip(is_number)
        .map(|(heading, is_number)| {
            let class = if is_number { " class=\"number\"" } else { "" };
            format!("<th scope=\"col\"{class}>{}</th>", escape(heading))
        })
        .collect();
    format!("<div class=\"scroll\"><table><thead><tr>{heads}</tr></thead><tbody>\n{body}</tbody></table></div>\n")
}

/// A section with a heading and what it shows; `lead` says in a sentence or two what to see.
pub(super) fn section(heading: &str, lead: &str, body: &str) -> String {
    format!("<section>\n<h2>{}</h2>\n<p class=\"lead\">{}</p>\n{body}</section>\n", escape(heading), escape(lead))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_cannot_leave_its_place() {
        assert_eq!(escape("<a href='x'>\"&\u{1b}"), "&lt;a href=&#39;x&#39;&gt;&quot;&amp;\\u{1b}");
    }

    #[test]
    fn numbers_are_shown_with_the_digits_that_count() {
        assert_eq!([0, 999, 1_000, 12_345_678].map(grouped), ["0", "999", "1,000", "12,345,678"]);
        assert_eq!(
            [0.0, 0.0123, 0.00123, 12.345, 123.4, 1234.0].map(small),
            ["0", "0.0123", "1.23e-3", "12.3", "123", "1.23e3"]
        );
        assert_eq!([999, 1_500, 2_000_000, 3_000_000_000].map(bytes), ["999 B", "1.5 kB", "2.0 MB", "3.00 GB"]);
    }

    #[test]
    fn a_number_in_a_table_carries_its_exact_value() {
        let html = table(&["a", "b"], [vec![Cell::Text("<x>".into()), Cell::decimals(0.123456789, 2)]]);
        assert!(html.contains("<td>&lt;x&gt;</td><td class=\"number\" data-value=\"0.123456789\">0.12</td>"), "{html}");
        assert!(html.contains("<th scope=\"col\">a</th><th scope=\"col\" class=\"number\">b</th>"), "{html}");
    }
}
