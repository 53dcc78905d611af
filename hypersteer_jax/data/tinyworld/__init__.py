"""The embedded world: topics, manners and subjects in plain English, a base LM that knows them, and an exact judge."""
