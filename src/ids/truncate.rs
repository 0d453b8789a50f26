//! Text from elsewhere, made fit for a log line or an answer.

use super::printable::is_unprintable;

/// Longest text from elsewhere that is passed on, in characters. Our own longest, a refusal for want of room with the
/// reason why the buffer did not grow, has some 450.
const TRUNCATED_LEN_MAX: usize = 600;

/// What stands for the rest.
const ELLIPSIS: &str = " ...";

/// The text without unprintable characters, and not longer than a line may be: what a peer says can neither forge a log
/// line nor fill a disk. What is longer is cut behind its last whole clause, or else its last whole word, that is not far
/// from the end.
pub fn truncate(text: &str) -> String {
    let mut truncated: String = text
        .chars()
        .take(TRUNCATED_LEN_MAX)
        .map(|character| if is_unprintable(character) { '\u{fffd}' } else { character })
        .collect();
    if text.chars().nth(TRUNCATED_LEN_MAX).is_some() {
        let half = truncated.len() / 2;
        let behind = |end: &str| truncated.rfind(end).filter(|&at| at > half);
        let clause = ["; ", ". ", ": "].into_iter().filter_map(behind).max();
        if let Some(at) = clause.or_else(|| behind(" ")) {
            truncated.truncate(at);
        }
        truncated.push_str(ELLIPSIS);
    }
    truncated
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_cannot_forge_a_line_or_fill_a_log() {
        // Broken in production: a peer's name holds a newline and an alarm of its own making, or ten megabytes.
        assert_eq!(truncate("x\nERROR forged"), "x\u{fffd}ERROR forged");
        assert_eq!(truncate(&"y".repeat(10_000)).chars().count(), TRUNCATED_LEN_MAX + ELLIPSIS.len());
    }

    #[test]
    fn what_is_too_long_ends_where_a_thought_does() {
        // Broken in production: an error text stops in the middle of the word that says what to do.
        let whole = "z".repeat(TRUNCATED_LEN_MAX);
        assert_eq!(truncate(&whole), whole);
        let clauses = format!("{}; raise pd_buffer_size to at least {}", "é ".repeat(200), "9".repeat(300));
        assert_eq!(truncate(&clauses), format!("{} ...", "é ".repeat(200)));
        let words = "word ".repeat(1000);
        assert!(truncate(&words).ends_with("word ..."), "{}", truncate(&words));
        // A mark near the start would throw nearly everything away.
        let early = format!("a: {}", "b".repeat(10_000));
        assert!(truncate(&early).starts_with("a: bbb"));
    }
}
