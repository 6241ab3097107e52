"""Images in memory, their votes under noise, and the conclusions: certificates, decisions, predictions."""
