"""Resumable streams: streams that outlive their connection, and go on at another replica after the death of theirs."""
