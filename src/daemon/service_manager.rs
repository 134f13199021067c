//! Tells systemd, or whoever started us its way, how the mount is: readiness, a line of status, the end.
//!
//! Without a service manager these do nothing.

use log::debug;
use sd_notify::NotifyState;

/// The mount answers.
pub(super) fn ready(status: &str) {
    notify(&[NotifyState::Ready, NotifyState::Status(status)]);
}

/// One line about how it goes.
pub(super) fn status(status: &str) {
    notify(&[NotifyState::Status(status)]);
}

/// The mount is being taken down.
pub(super) fn stopping(status: &str) {
    notify(&[NotifyState::Stopping, NotifyState::Status(status)]);
}

fn notify(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        debug!("service manager not told: {error}");
    }
}
