//! Tables of measurements: for a terminal of any width, as Markdown, CSV or JSON.
//!
//! JSON has one object: `version` 1, the facts, and `rows`, one object each; shares are numbers between 0
//! and 1, times in seconds, rates in units a second; fields are only ever added. Invariant: every form
//! shows the same numbers, rounded only for people.

use std::fmt::Write as _;

use serde_json::{Map, Value, json};

/// How a table is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Format {
    /// For a terminal: aligned, or one row below the other where it is narrow
    Table,
    /// Markdown
    Md,
    /// Comma-separated values
    Csv,
    /// One JSON object
    Json,
}

/// One entry of a table.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Cell {
    /// A name.
    Text(String),
    /// A number, what people see of it, and the digits after its point.
    Number {
        value: f64,
        /// What the value is multiplied with for people: 1e3 shows seconds in milliseconds.
        times: f64,
        digits: usize,
        unit: &'static str,
    },
    /// Not measured.
    Nothing,
}

impl Cell {
    pub(super) fn text(text: impl Into<String>) -> Self {
        Self::Text(text.into())
    }

    pub(super) fn count(n: usize) -> Self {
        Self::number(n as f64, 0)
    }

    pub(super) fn number(value: f64, digits: usize) -> Self {
        let (times, unit) = (1.0, "");
        Self::Number {
            value,
            times,
            digits,
            unit,
        }
    }

    /// Seconds, shown in milliseconds.
    pub(super) fn milliseconds(value: f64) -> Self {
        let digits = if value < 1e-2 { 3 } else { 1 };
        let (times, unit) = (1e3, "");
        Self::Number {
            value,
            times,
            digits,
            unit,
        }
    }

    /// Seconds, shown in microseconds.
    pub(super) fn microseconds(value: f64) -> Self {
        let (times, digits, unit) = (1e6, 1, "");
        Self::Number {
            value,
            times,
            digits,
            unit,
        }
    }

    /// A part of one, shown in per cent.
    pub(super) fn share(value: f64) -> Self {
        let (times, digits, unit) = (100.0, 1, "%");
        Self::Number {
            value,
            times,
            digits,
            unit,
        }
    }

    /// Units a second, shown in thousand millions.
    pub(super) fn giga(value: f64) -> Self {
        let (times, digits, unit) = (1e-9, 1, "");
        Self::Number {
            value,
            times,
            digits,
            unit,
        }
    }

    fn shown(&self) -> String {
        match self {
            Self::Text(text) => text.clone(),
            Self::Number {
                value,
                times,
                digits,
                unit,
            } => format!("{:.digits$}{unit}", value * times),
            Self::Nothing => "-".to_owned(),
        }
    }

    fn to_json(&self) -> Value {
        match self {
            Self::Text(text) => json!(text),
            Self::Number { value, .. } => json!(value),
            Self::Nothing => Value::Null,
        }
    }
}

/// What was measured, and the circumstances.
#[derive(Clone, Debug, Default)]
pub(super) struct Table {
    /// Key and contents of what holds for all rows.
    pub(super) facts: Vec<(&'static str, Cell)>,
    /// Key, and the title that people read.
    pub(super) columns: Vec<(&'static str, &'static str)>,
    /// One cell for each column.
    pub(super) rows: Vec<Vec<Cell>>,
}

impl Table {
    /// The whole text in a format; `width` is that of the terminal, if it is one.
    pub(super) fn written(&self, format: Format, width: Option<usize>) -> String {
        match format {
            Format::Table => self.for_terminal(width),
            Format::Md => self.markdown(),
            Format::Csv => self.csv(),
            Format::Json => format!("{:#}\n", self.to_json()),
        }
    }

    fn facts(&self, mark: &str) -> String {
        let mut out = String::new();
        for (key, cell) in &self.facts {
            // Writing to a string cannot fail.
            let label = key.replace("_gb_per_s", ", GB/s").replace('_', " ");
            let _ = writeln!(out, "{mark}{label}: {}", cell.shown());
        }
        out
    }

    fn shown(&self) -> Vec<Vec<String>> {
        let row = |row: &Vec<Cell>| row.iter().map(Cell::shown).collect();
        self.rows.iter().map(row).collect()
    }

    fn for_terminal(&self, width: Option<usize>) -> String {
        let mut out = super::output::neutralise(&self.facts("")).into_owned();
        out.push('\n');
        let rows = self.shown();
        let widths: Vec<usize> = (0..self.columns.len())
            .map(|at| {
                let cells = rows.iter().map(|row| row[at].chars().count());
                cells
                    .max()
                    .unwrap_or(0)
                    .max(self.columns[at].1.chars().count())
            })
            .collect();
        let total = widths.iter().sum::<usize>() + 2 * widths.len().saturating_sub(1);
        if width.is_some_and(|width| width < total) {
            let label = self.columns.iter().map(|c| c.1.chars().count()).max();
            for row in &rows {
                for ((_, title), cell) in self.columns.iter().zip(row) {
                    let _ = writeln!(out, "{title:<0$}  {cell}", label.unwrap_or(0));
                }
                out.push('\n');
            }
            return out;
        }
        let titles: Vec<String> = self.columns.iter().map(|c| c.1.to_owned()).collect();
        for row in std::iter::once(&titles).chain(&rows) {
            let cells = row.iter().zip(&widths).zip(&self.columns).enumerate();
            let line: Vec<String> = cells
                .map(|(at, ((cell, width), _))| {
                    // Names stand to the left, numbers to the right.
                    let names = self.rows.iter().all(|r| matches!(r[at], Cell::Text(_)));
                    if names {
                        format!("{cell:<width$}")
                    } else {
                        format!("{cell:>width$}")
                    }
                })
                .collect();
            let _ = writeln!(out, "{}", line.join("  ").trim_end());
        }
        out
    }

    fn markdown(&self) -> String {
        let mut out = self.facts("* ");
        let titles: Vec<_> = self.columns.iter().map(|c| c.1).collect();
        let rule = titles.iter().map(|_| "--:").collect::<Vec<_>>();
        let _ = writeln!(out, "\n| {} |\n|{}|", titles.join(" | "), rule.join("|"));
        for row in self.shown() {
            let _ = writeln!(out, "| {} |", row.join(" | "));
        }
        out
    }

    fn csv(&self) -> String {
        let quoted = |text: &str| {
            if text.contains([',', '"', '\n']) {
                format!("\"{}\"", text.replace('"', "\"\""))
            } else {
                text.to_owned()
            }
        };
        let facts = self.facts.iter();
        let keys: Vec<_> = self.columns.iter().map(|c| c.0).collect();
        let keys = facts.clone().map(|f| f.0).chain(keys).collect::<Vec<_>>();
        let mut out = keys.join(",") + "\n";
        for row in &self.rows {
            let cells = facts.clone().map(|f| &f.1).chain(row);
            let line = cells.map(|cell| match cell {
                Cell::Text(text) => quoted(text),
                Cell::Number { value, .. } => value.to_string(),
                Cell::Nothing => String::new(),
            });
            let _ = writeln!(out, "{}", line.collect::<Vec<_>>().join(","));
        }
        out
    }

    fn to_json(&self) -> Value {
        let mut out = Map::new();
        out.insert("version".into(), json!(1));
        for (key, cell) in &self.facts {
            out.insert((*key).into(), cell.to_json());
        }
        let row = |row: &Vec<Cell>| -> Value {
            let fields = self.columns.iter().zip(row);
            let fields = fields.map(|((key, _), cell)| ((*key).to_owned(), cell.to_json()));
            Value::Object(fields.collect())
        };
        out.insert("rows".into(), self.rows.iter().map(row).collect());
        Value::Object(out)
    }
}

/// Prints a table to standard output.
pub(super) fn print(table: &Table, format: Format) -> crate::Result<()> {
    let term = console::Term::stdout();
    let width = term.size_checked().map(|(_, columns)| usize::from(columns));
    super::print(&table.written(format, width))
}

/// A plot of lines as SVG: for each, its name and its points.
pub(super) fn plot(title: &str, x: &str, y: &str, lines: &[(String, Vec<[f64; 2]>)]) -> String {
    const COLOURS: [&str; 6] = [
        "#3b7dd8", "#d2691e", "#3a9a4a", "#a03ab0", "#b03a3a", "#777777",
    ];
    let (width, height, left, base) = (640.0, 360.0, 70.0, 300.0);
    let points = || lines.iter().flat_map(|l| &l.1);
    let most_x = points().map(|p| p[0]).fold(f64::MIN_POSITIVE, f64::max);
    let most_y = points().map(|p| p[1]).fold(f64::MIN_POSITIVE, f64::max) * 1.1;
    let at = |p: &[f64; 2]| {
        let x = left + p[0] / most_x * (width - left - 120.0);
        [x, base - p[1] / most_y * (base - 50.0)]
    };
    let text = |text: &str| {
        let text = super::output::neutralise(text);
        text.replace('&', "&amp;").replace('<', "&lt;")
    };
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" \
         font-family=\"sans-serif\" font-size=\"13\">\n\
         <rect width=\"{width}\" height=\"{height}\" fill=\"#ffffff\"/>\n\
         <text x=\"{left}\" y=\"24\" font-size=\"15\">{}</text>\n\
         <text x=\"{left}\" y=\"42\" fill=\"#555555\">{}</text>\n\
         <text x=\"{:.1}\" y=\"{:.1}\" fill=\"#555555\">{}</text>\n\
         <path d=\"M{left} 50V{base}H{:.1}\" fill=\"none\" stroke=\"#777777\"/>\n",
        text(title),
        text(y),
        width - 110.0,
        base + 20.0,
        text(x),
        width - 110.0,
    );
    for part in 0..=4 {
        let value = most_y * f64::from(part) / 4.4;
        let y = at(&[0.0, value])[1];
        let digits = if most_y < 10.0 { 2 } else { 0 };
        let _ = writeln!(
            out,
            "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{value:.digits$}</text>",
            left - 6.0,
            y + 4.0
        );
    }
    let mut marks: Vec<f64> = points().map(|p| p[0]).collect();
    marks.sort_by(f64::total_cmp);
    marks.dedup();
    for mark in marks {
        let x = at(&[mark, 0.0])[0];
        let _ = writeln!(
            out,
            "<text x=\"{x:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{mark}</text>",
            base + 20.0
        );
    }
    for ((name, points), colour) in lines.iter().zip(COLOURS.iter().cycle()) {
        let path: Vec<String> = points
            .iter()
            .map(at)
            .map(|[x, y]| format!("{x:.1} {y:.1}"))
            .collect();
        let _ = writeln!(
            out,
            "<path d=\"M{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"/>",
            path.join("L")
        );
        for [x, y] in points.iter().map(at) {
            let _ = writeln!(
                out,
                "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3\" fill=\"{colour}\"/>"
            );
        }
        if let Some([x, y]) = points.last().map(at) {
            let _ = writeln!(
                out,
                "<text x=\"{:.1}\" y=\"{:.1}\" fill=\"{colour}\">{}</text>",
                x + 8.0,
                y + 4.0,
                text(name)
            );
        }
    }
    out + "</svg>\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table() -> Table {
        Table {
            facts: vec![("device", Cell::text("a GPU, \"fast\""))],
            columns: vec![("workers", "workers"), ("of_roof", "of the roof")],
            rows: vec![
                vec![Cell::count(1), Cell::share(0.713)],
                vec![Cell::count(16), Cell::Nothing],
            ],
        }
    }

    #[test]
    fn a_wide_terminal_gets_columns_and_a_narrow_one_a_list() {
        let wide = table().written(Format::Table, Some(20));
        assert!(
            wide.ends_with("workers  of the roof\n      1        71.3%\n     16            -\n"),
            "{wide}"
        );
        let narrow = table().written(Format::Table, Some(19));
        assert!(
            narrow.contains("workers      1\nof the roof  71.3%\n"),
            "{narrow}"
        );
        assert!(narrow.lines().all(|l| l.chars().count() < 24), "{narrow}");
    }

    #[test]
    fn every_form_has_the_same_numbers() {
        let md = table().written(Format::Md, None);
        assert!(md.contains("| 1 | 71.3% |\n| 16 | - |\n"), "{md}");
        let csv = table().written(Format::Csv, None);
        assert!(
            csv.ends_with("\"a GPU, \"\"fast\"\"\",1,0.713\n\"a GPU, \"\"fast\"\"\",16,\n"),
            "{csv}"
        );
        let json: Value = serde_json::from_str(&table().written(Format::Json, None)).expect("JSON");
        assert_eq!(json["rows"][0]["of_roof"], 0.713);
        assert_eq!(json["rows"][1]["of_roof"], Value::Null, "not measured");
    }

    #[test]
    fn a_plot_has_a_line_for_each_name() {
        let lines = [1, 4].map(|w| {
            (
                format!("{w} <workers>"),
                vec![[1024.0, 20.0], [4096.0, 25.0]],
            )
        });
        let svg = plot("ms & tokens", "context", "ms", &lines);
        assert_eq!(svg.matches("<circle").count(), 4, "{svg}");
        assert!(
            svg.contains("4 &lt;workers>") && svg.contains("ms &amp; tokens"),
            "{svg}"
        );
    }
}
