"""Does AdaKD help? Arms that differ in the method alone, several seeds, judged on held-out prompts. docs/quality.md."""
