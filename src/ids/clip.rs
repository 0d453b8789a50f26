//! Text from elsewhere, made fit for a log line or an answer.

/// Longest text from elsewhere that is passed on, in characters.
const CLIPPED_LEN_MAX: usize = 300;

/// The text without control characters, and not longer than a line may be: what a stranger says can neither forge a log
/// line nor fill a disk.
pub fn clip(text: &str) -> String {
    let mut clipped: String = text
        .chars()
        .take(CLIPPED_LEN_MAX)
        .map(|character| if character.is_control() { '\u{fffd}' } else { character })
        .collect();
    if text.chars().nth(CLIPPED_LEN_MAX).is_some() {
        clipped.push_str("...");
    }
    clipped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stranger_cannot_forge_a_line_or_fill_a_log() {
        // Broken in production: a peer's name holds a newline and an alarm of its own making, or ten megabytes.
        assert_eq!(clip("x\nERROR forged"), "x\u{fffd}ERROR forged");
        assert_eq!(clip(&"y".repeat(10_000)).chars().count(), CLIPPED_LEN_MAX + 3);
    }
}
