-- positions.lua: where rooms stand, hundreds per call.
--
-- KEYS: seq of each room
-- Reply: per room 'epoch seq tag', '' where Redis knows nothing of it.

local reply = {}
for i = 1, #KEYS do
  reply[i] = redis.call('HGET', KEYS[i], 'p') or ''
end
return reply
