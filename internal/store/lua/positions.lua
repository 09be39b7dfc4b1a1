-- positions.lua: where rooms stand, hundreds per call.
--
-- KEYS: seq of each room
-- Reply: per room 'epoch seq tag', '' where Redis knows nothing of it.

local reply = {}
for i = 1, #KEYS do
  local h = redis.call('HMGET', KEYS[i], 'e', 's', 't')
  reply[i] = h[1] and (h[1] .. ' ' .. h[2] .. ' ' .. h[3]) or ''
end
return reply
