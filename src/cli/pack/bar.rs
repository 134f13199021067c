//! How far packing has come, how long each phase took, and what signals ask for.

use std::io::IsTerminal;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag::{register, register_conditional_shutdown};

use super::PackCommandError;
use crate::pack::encode::Progress;

/// A bar on a terminal, nothing elsewhere; and what SIGINT and SIGTERM ask for.
pub(in crate::cli) struct Bar {
    pub(in crate::cli) bar: ProgressBar,
    interrupted: Arc<AtomicBool>,
    /// What took how long.
    phases: Mutex<Phases>,
}

/// What is going on, and what was before it.
#[derive(Default)]
struct Phases {
    current: Option<(String, Instant)>,
    ended: Vec<Phase>,
}

/// What took how long.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(in crate::cli) struct Phase {
    /// What was done.
    pub(in crate::cli) phase: String,
    /// How long it took.
    pub(in crate::cli) seconds: f64,
}

impl Bar {
    /// From here on, the first signal stops the work in an orderly way, and a second one at once.
    pub(in crate::cli) fn new() -> Result<Self, PackCommandError> {
        let target =
            if std::io::stderr().is_terminal() { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
        let style = "{msg:10} [{wide_bar}] {bytes}/{total_bytes} {bytes_per_sec} {eta}";
        let bar = ProgressBar::with_draw_target(Some(0), target);
        bar.set_style(ProgressStyle::with_template(style).expect("the template is right").progress_chars("=> "));
        let interrupted = Arc::new(AtomicBool::new(false));
        for signal in [SIGINT, SIGTERM] {
            // In this order: the flag is not yet set when the first signal comes to the first of the two.
            register_conditional_shutdown(signal, 128 + signal, Arc::clone(&interrupted))
                .and_then(|_| register(signal, Arc::clone(&interrupted)))
                .map_err(PackCommandError::Signals)?;
        }
        Ok(Self { bar, interrupted, phases: Mutex::default() })
    }

    /// The phases since the last call, the one that is going on among them.
    pub(super) fn take_phases(&self) -> Vec<Phase> {
        let mut phases = self.phases.lock().unwrap_or_else(PoisonError::into_inner);
        phases.end();
        std::mem::take(&mut phases.ended)
    }
}

impl Phases {
    /// Adds what is going on to what was; a phase that comes again is one.
    fn end(&mut self) {
        let Some((phase, since)) = self.current.take() else { return };
        let seconds = since.elapsed().as_secs_f64();
        match self.ended.iter_mut().find(|before| before.phase == phase) {
            Some(before) => before.seconds += seconds,
            None => self.ended.push(Phase { phase, seconds }),
        }
    }
}

impl Progress for Bar {
    fn phase(&self, name: &str, bytes: u64) {
        self.bar.reset();
        self.bar.set_length(bytes);
        self.bar.set_message(name.to_owned());
        log::debug!("phase: {name}");
        let mut phases = self.phases.lock().unwrap_or_else(PoisonError::into_inner);
        phases.end();
        phases.current = Some((name.to_owned(), Instant::now()));
    }

    fn advance(&self, bytes: u64) {
        self.bar.inc(bytes);
    }

    fn is_interrupted(&self) -> bool {
        self.interrupted.load(Ordering::Relaxed)
    }
}
