//! Calls into libraries that panic on a file which no program wrote.
//!
//! A file may be hostile and must not end the process, so such a call is made through `caught`, and a
//! panic in it is a value. Invariant: what is caught is not reported twice; [`keep_quiet`] leaves all
//! other panics to the hook that was there before.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};

thread_local! {
    /// Calls of [`caught`] that this thread is inside of.
    static DEPTH: Cell<usize> = const { Cell::new(0) };
}

/// Makes a call; `None` if it panicked. What it changed by then is not to be used again.
pub(crate) fn caught<T>(call: impl FnOnce() -> T) -> Option<T> {
    DEPTH.set(DEPTH.get() + 1);
    let out = catch_unwind(AssertUnwindSafe(call));
    DEPTH.set(DEPTH.get() - 1);
    out.ok()
}

/// Makes panics that are caught print nothing: their caller says in one line what is wrong.
///
/// For programs, once at their start; a library leaves the hook alone.
pub fn keep_quiet() {
    let loud = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        if DEPTH.get() == 0 {
            loud(info);
        }
    }));
}

#[cfg(test)]
mod tests {
    use super::{DEPTH, caught};

    #[test]
    fn a_panic_is_a_value() {
        let none: Option<()> = caught(|| panic!("a library gave up"));
        assert_eq!(none, None, "the panic ends in the call");
        assert_eq!(caught(|| caught(|| 7)), Some(Some(7)), "calls nest");
        assert_eq!(DEPTH.get(), 0, "later panics are reported");
    }
}
