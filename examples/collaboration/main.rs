//! What collaboration is worth: the built-in model with 1 to 4 workers, beside the scripted policy that it
//! learned from, and with something taken away.
//!
//! `cargo run --release --example collaboration -- [--problems 500] [--device cpu] [--svg FILE]`. Greedy, on
//! fresh problems of 3 to 8 sums; accuracy with 95 % Wilson intervals.

#![allow(clippy::print_stdout, reason = "its output is its purpose")]

mod scenes;

use std::fmt::Write as _;
use std::sync::Arc;

use clap::Parser;
use hogwild::Result;
use hogwild::demo::Problem;
use hogwild::device::Device;
use hogwild::protocol::NAMES;
use scenes::{Run, Scene, Stage, UNSEEN_NAMES, policy};

#[derive(Parser)]
struct Args {
    /// Problems for each row.
    #[arg(long, default_value_t = 500)]
    problems: u64,
    /// `auto`, `cpu`, or part of an adapter's name.
    #[arg(long, default_value = "auto")]
    device: String,
    /// Storage of the cache.
    #[arg(long, default_value = "f16")]
    kv_dtype: String,
    /// Where to draw the passes.
    #[arg(long)]
    svg: Option<std::path::PathBuf>,
}

/// Sums over the runs of a row.
#[derive(Default)]
struct Row {
    n: f64,
    all_right: f64,
    right: f64,
    sums: f64,
    passes: f64,
    scripted: f64,
    duplicates: f64,
}

impl Row {
    fn add(&mut self, run: Run, scripted: Run) {
        self.n += 1.0;
        self.all_right += f64::from(u8::from(run.all_right()));
        self.right += run.right as f64;
        self.sums += run.sums as f64;
        self.passes += run.passes as f64;
        self.scripted += scripted.passes as f64;
        self.duplicates += run.duplicates() as f64;
    }

    /// 95 % interval of the share of problems that are all right (Wilson).
    fn interval(&self) -> (f64, f64) {
        let (n, p, z) = (self.n, self.all_right / self.n, 1.96_f64);
        let middle = (p + z * z / (2.0 * n)) / (1.0 + z * z / n);
        let half = z / (1.0 + z * z / n) * (p * (1.0 - p) / n + z * z / (4.0 * n * n)).sqrt();
        ((middle - half).max(0.0), (middle + half).min(1.0))
    }

    fn print(&self, name: &str, workers: usize) {
        let (low, high) = self.interval();
        println!(
            "| {name} | {workers} | {:.1} % ({:.1} to {:.1}) | {:.2} % | {:.1} | {:.1} | {:.3} | {:.2} % |",
            100.0 * self.all_right / self.n,
            100.0 * low,
            100.0 * high,
            100.0 * self.right / self.sums,
            self.passes / self.n,
            self.scripted / self.n,
            self.passes / self.scripted,
            100.0 * self.duplicates / self.sums,
        );
    }
}

fn main() -> Result<()> {
    let args = Args::parse();
    let device = Arc::new(Device::open(&args.device)?);
    println!(
        "{} problems a row, 3 to 8 sums, greedy, on {}\n",
        args.problems,
        device.name()
    );
    let stage = Stage::new(device, &args.kv_dtype)?;
    println!(
        "| condition | workers | all right (95 %) | results right | passes | scripted | ratio | duplicates |"
    );
    println!("|---|--:|--:|--:|--:|--:|--:|--:|");
    let row = |name: &str, scene: Scene, names: &[&str]| -> Result<Row> {
        let mut row = Row::default();
        for i in 0..args.problems {
            let sums = 3 + usize::try_from(i % 6).unwrap_or(0);
            let problem = Problem::random(0x5eed_0000 + i, sums);
            let (run, _) = stage.run(&problem, names, scene, i)?;
            row.add(run, policy(&problem, names, scene, i));
        }
        row.print(name, names.len());
        Ok(row)
    };
    let mut drawn = Vec::new();
    for n in 1..=4 {
        drawn.push(row("together", Scene::Plain, &NAMES[..n])?);
    }
    for n in [2, 4] {
        row("stalls at random", Scene::Stalls, &NAMES[..n])?;
        row("joining late", Scene::Late, &NAMES[..n])?;
        row("retiring", Scene::Retire, &NAMES[..n])?;
        row(
            "finished steps only (interleaved)",
            Scene::Interleaved,
            &NAMES[..n],
        )?;
        row(
            "texts in one piece (contiguous)",
            Scene::Contiguous,
            &NAMES[..n],
        )?;
    }
    row("names swapped", Scene::Swapped, &["Bob", "Alice"])?;
    row("names unseen", Scene::Unseen, &UNSEEN_NAMES[..2])?;
    row("names unseen", Scene::Unseen, &UNSEEN_NAMES)?;
    // Workers that do not see each other are as many solo runs; the session is over with the first.
    let mut isolated = Row::default();
    for i in 0..args.problems {
        let problem = Problem::random(0x5eed_0000 + i, 3 + usize::try_from(i % 6).unwrap_or(0));
        let alone = |name| {
            stage
                .run(&problem, &[name], Scene::Plain, i)
                .map(|(run, _)| run)
        };
        let (a, b) = (alone(NAMES[0])?, alone(NAMES[1])?);
        let first = if a.passes <= b.passes { a } else { b };
        let run = Run {
            work: a.work + b.work,
            ..first
        };
        isolated.add(run, policy(&problem, &NAMES[..1], Scene::Plain, i));
    }
    isolated.print("isolated (scripted: one worker)", 2);
    if let Some(path) = &args.svg {
        std::fs::write(path, svg(&drawn, &isolated)).map_err(hogwild::Error::io(path))?;
    }
    Ok(())
}

/// Mean passes by number of workers: bars of the engine, ticks of the policy, a line for one worker alone.
fn svg(rows: &[Row], isolated: &Row) -> String {
    let most = rows.iter().map(|r| r.passes / r.n).fold(1.0, f64::max) * 1.1;
    let (width, height, left, base) = (560.0, 300.0, 60.0, 250.0);
    let y = |v: f64| base - v / most * 210.0;
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" font-family=\"sans-serif\" \
         font-size=\"13\">\n<rect width=\"{width}\" height=\"{height}\" fill=\"#ffffff\"/>\n\
         <text x=\"{left}\" y=\"24\" font-size=\"15\">Passes to the answer (mean, 3 to 8 sums)</text>\n"
    );
    for (i, row) in rows.iter().enumerate() {
        let (x, v, s) = (
            left + 20.0 + i as f64 * 115.0,
            row.passes / row.n,
            row.scripted / row.n,
        );
        let n = i + 1;
        let _ = write!(
            out,
            "<rect x=\"{x}\" y=\"{:.1}\" width=\"70\" height=\"{:.1}\" fill=\"#3b7dd8\"/>\n\
             <line x1=\"{:.1}\" x2=\"{:.1}\" y1=\"{:.1}\" y2=\"{:.1}\" stroke=\"#d2691e\" stroke-width=\"3\"/>\n\
             <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{v:.0}</text>\n\
             <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{n} worker{}</text>\n",
            y(v),
            base - y(v),
            x - 6.0,
            x + 76.0,
            y(s),
            y(s),
            x + 35.0,
            y(v) - 6.0,
            x + 35.0,
            base + 18.0,
            if n == 1 { "" } else { "s" },
        );
    }
    let alone = y(isolated.passes / isolated.n);
    let _ = write!(
        out,
        "<line x1=\"{left}\" x2=\"{:.1}\" y1=\"{alone:.1}\" y2=\"{alone:.1}\" stroke=\"#777777\" \
         stroke-dasharray=\"5 4\"/>\n<text x=\"{left}\" y=\"{:.1}\" fill=\"#555555\">dashed: two workers that do \
         not see each other; orange: the scripted policy</text>\n</svg>\n",
        width - 20.0,
        base + 40.0,
    );
    out
}
