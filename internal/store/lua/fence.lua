-- fence.lua: locks an incarnation out of a bucket, also when Redis is out of memory (the DEL is not refused then, and what
-- follows it neither).
--
-- KEYS[1] fence
-- ARGV[1] for how long (ms)

redis.call('DEL', KEYS[1])
redis.call('SET', KEYS[1], 'dead', 'PX', ARGV[1])
return 1
