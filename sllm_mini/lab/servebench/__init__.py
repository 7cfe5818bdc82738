"""What HTTP and the cluster add to an engine's time (`measure_overhead`), and a trace played over HTTP (`measure_served`). Chapter 11."""
