//! `hogwild replay`: runs a log again and says whether it is the same.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use super::load::{LoadArgs, name_tokenizer};
use super::print;
use crate::demo;
use crate::model::ModelFiles;
use crate::session::{Event, read_log, replay};
use crate::text::{Text, child};
use crate::{Error, Result};

/// Arguments of `hogwild replay`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The log, as `generate --log` writes it
    log: PathBuf,

    #[command(flatten)]
    load: LoadArgs,
}

pub(super) fn run(args: &Args) -> Result<ExitCode> {
    let (header, events) = read_log(&args.log)?;
    // What makes no sense is the log's, not the user's.
    let in_log = |error| match error {
        Error::Usage(problem) => Error::Log {
            path: args.log.clone(),
            line: 1,
            problem,
        },
        other => other,
    };
    let directory = args
        .load
        .directory()?
        .unwrap_or_else(|| PathBuf::from(&header.model.directory));
    let built_in = args.load.model.is_none() && header.model.directory == demo::NAME;
    let files = if built_in {
        demo::files()?
    } else {
        ModelFiles::open(&directory)?
    };
    if files.hash() != header.model.hash {
        let problem = format!(
            "the log is of another model: its hash is {}, that of {} is {}; name the right one with -m",
            header.model.hash,
            directory.display(),
            files.hash()
        );
        return Err(Error::Log {
            path: args.log.clone(),
            line: 1,
            problem,
        });
    }
    let most = files.config.max_positions;
    if header.settings.context > most || header.settings.context == 0 {
        let problem = format!(
            "a context of {} is outside 1 to {most}",
            header.settings.context
        );
        return Err(Error::Log {
            path: args.log.clone(),
            line: 1,
            problem,
        });
    }
    let text = Arc::new(if built_in {
        demo::text()?
    } else {
        Text::load(&directory)?.with_renderer(child::render)
    });
    let wanted = args.load.device.as_deref().unwrap_or(&header.device);
    let devices = args.load.open_devices(wanted)?;
    // Layers are where they were, unless something else is asked for.
    let layers = match (&args.load.device, &args.load.layers[..]) {
        (None, []) => &header.layers[..],
        (_, given) => given,
    };
    let settings = &header.settings;
    let kv_dtype = settings.kv_type().map_err(in_log)?;
    let model = args
        .load
        .load(&devices, layers, &files, settings.context, kv_dtype);
    // What the list of the log does not fit is the log's.
    let model = if args.load.device.is_none() && args.load.layers.is_empty() {
        model.map_err(in_log)?
    } else {
        model?
    };
    if model.device_names() != header.device {
        args.load.note(&format!(
            "the log was written on {}: another device may round differently",
            header.device
        ));
    }
    let ran = replay(&header, &events, model, text, args.load.check, &mut |_| {
        Ok(())
    });
    let outcome = ran.map_err(name_tokenizer(&directory)).map_err(in_log)?;
    let Some(difference) = outcome.difference else {
        print(&format!(
            "no difference: {} passes, {} tokens\n",
            outcome.passes, outcome.tokens
        ))?;
        return Ok(ExitCode::SUCCESS);
    };
    let say = |event: &Option<Event>| match event {
        Some(Event::Token {
            pass, worker, id, ..
        }) => {
            let name = header.names.get(*worker).map_or("the text", String::as_str);
            format!("token {id} of {name} in pass {pass}")
        }
        Some(event) => serde_json::to_string(event).unwrap_or_else(|e| e.to_string()),
        None => "nothing".to_owned(),
    };
    // The header is line 1.
    print(&format!(
        "differs at line {}: the log has {}, the run {}\n",
        difference.event + 2,
        say(&difference.logged),
        say(&difference.ran)
    ))?;
    Ok(ExitCode::FAILURE)
}
