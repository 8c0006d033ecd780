//! The demonstration model through the ordinary session: every part of the engine must be right for it to
//! divide work, and to gather what others found.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::path::Path;
use std::sync::Arc;

use hogwild::cache::layout::Layout;
use hogwild::device::Device;
use hogwild::model::{Model, ModelFiles};
use hogwild::protocol::{AnswerKind, Problem, PromptStyle, Protocol, Rules, default_names};
use hogwild::session::{Command, Event, Reason, Session, Settings};
use hogwild::text::{Date, Text};

const DIR: &str = "examples/demo_model/model";
const PROBLEM: &str =
    "a) 20+8+9; b) 41+4; c) 17+8+4+7; d) 30+9+5; e) 12+3+8+9+1; f) 26+2; g) 33+5+7; h) 19+6+6+4";
const ANSWER: &str = "37,45,36,44,33,28,45,35";

/// A session of so many workers on [`PROBLEM`], on the CPU path.
fn session(workers: usize) -> Session {
    let files = ModelFiles::open(DIR).unwrap();
    let text = Arc::new(Text::load(Path::new(DIR)).unwrap());
    let model = Model::load(Arc::new(Device::cpu()), &files, 2048, &mut |_| {}).unwrap();
    let source = fs::read_to_string(format!("{DIR}/prompt.txt")).unwrap();
    let style = PromptStyle::parse("prompt.txt", &source).unwrap();
    let rules = Rules {
        answer: AnswerKind::Balanced,
        check_every: usize::MAX,
        ..Rules::main()
    };
    let problem = Problem {
        text: PROBLEM,
        style: &style,
        thinking: None,
        today: Date::default(),
    };
    let protocol = Protocol::open(text, rules, &default_names(workers), &problem).unwrap();
    let settings = Settings {
        layout: Layout::Combined,
        max_passes: 400,
        context: 2048,
        kv_dtype: "f16".to_owned(),
        early_answer: false,
        temperature: 0.0,
        top_k: 0,
        top_p: 1.0,
        min_p: 0.0,
        seed: 0,
        vocab_limit: None,
    };
    let engine = settings.engine(Arc::new(model), false).unwrap();
    Session::new(engine, protocol, settings).unwrap()
}

/// Runs to the end; the answer without blanks must be right.
fn passes_to_the_answer(session: &mut Session) -> u64 {
    while !session.is_over() {
        for event in session.step(&[]).unwrap() {
            if let Event::Finish { reason, answer, .. } = event {
                assert_eq!(reason, Reason::Answer, "a finished step holds the answer");
                assert_eq!(answer.unwrap().replace(' ', ""), ANSWER, "{PROBLEM}");
            }
        }
    }
    session.passes()
}

#[test]
fn more_workers_need_fewer_passes() {
    let [one, two, four] = [1, 2, 4].map(|n| passes_to_the_answer(&mut session(n)));
    assert!(
        10 * two <= 7 * one,
        "two workers: {two} passes instead of {one}"
    );
    assert!(
        2 * four <= one,
        "four workers: {four} passes instead of {one}"
    );
}

#[test]
fn one_who_joins_late_takes_what_is_left() {
    let mut session = session(1);
    for _ in 0..40 {
        session.step(&[]).unwrap();
    }
    let name = "Bob".to_owned();
    session.step(&[Command::Join { name }]).unwrap();
    let passes = passes_to_the_answer(&mut session);
    let alone = passes_to_the_answer(&mut self::session(1));
    assert!(passes < alone, "{passes} passes instead of {alone}");
}
